# What measuring rules read. Plain `ancient` would hide that a file is about to be made anew.


def kept(file, digest, record=None, samples=0, roped_keys=False):
    """An input whose time does not count if its record has the digest that the study asks for.

    A copied or cloned folder has times in any order.
    """
    whole = digests.settled(resolved(record or file), digest, samples, roped_keys)
    return ancient(file) if whole else file


def resolved(file):
    """A path with its pathvars filled in."""
    folders = {"results": STUDY_FILE.parent, "cache": STUDY.pathvars.get("cache", "resources")}
    return re.sub("<(.*?)>", lambda match: str(folders[match[1]]), file)


def weights(wildcards):
    """The manifest of a model."""
    spec = digests.weights_digest(STUDY.models[wildcards.model])
    return kept(f"<cache>/models/{wildcards.model}/manifest.json", spec)


def calibrated(name, wildcards):
    """A file of a model's calibration; stats.json tells the digest of both."""
    chosen = STUDY.calibration_name(wildcards.scheme)
    folder = f"<results>/{calibration_place(wildcards.model, chosen)}"
    digest = digests.calibration_digest(STUDY, wildcards.model, chosen)
    samples = digests.samples_of(STUDY, wildcards.scheme)
    roped_keys = digests.roped_keys_of(STUDY, wildcards.scheme)
    return kept(f"{folder}/{name}", digest, f"{folder}/stats.json", samples, roped_keys)


def quantizer(wildcards):
    """The quantizer file, for schemes that are calibrated: the published one where there is one."""
    name, scheme = wildcards.model, digests.tables_scheme(STUDY, wildcards.scheme)
    if not STUDY.schemes[scheme].registration.calibrated:
        return []
    digest = digests.quantizer_digest(STUDY, name, scheme)
    if published := published_file(name, scheme, digest):
        return ancient(published)
    return kept(f"<results>/models/{name}/{scheme}/quantizer.json", digest)


@functools.cache
def published_file(model, scheme, digest):
    """The published quantizer of that digest, or none; its files are verified once per run."""
    try:
        found = published_quantizer(quantizers_from(STUDY), model, scheme, digest)
    except UserError as error:
        raise WorkflowError(str(error))
    return str(found) if found else ""


def asked(wildcards):
    """The prompts of a task that has them. Their name holds their digest: no other can be there."""
    return asked_by(wildcards.model, wildcards.task)


def asked_by(model, task):
    """The prompts of a model's task, or none."""
    if not digests.asks_prompts(STUDY.tasks[task]):
        return []
    name = digests.prompts_name(STUDY, model, task)
    return ancient(f"<cache>/prompts/{model}/{task}/{name}.jsonl.gz")


def all_asked(wildcards):
    """The prompts of all tasks that have them."""
    return [file for task in STUDY.tasks if (file := asked_by(wildcards.model, task))]


def read_text(wildcards):
    """The text that an evaluation reads itself; other suites have theirs in the prompts."""
    return [] if digests.asks_prompts(STUDY.tasks[wildcards.task]) else text(wildcards)


def all_read(wildcards):
    """The texts that evaluations read themselves, one per such task."""
    return [text_of(name) for name, task in STUDY.tasks.items() if not digests.asks_prompts(task)]


def text(wildcards):
    """The manifest of the text that a task is made of, if it is made of one."""
    return text_of(wildcards.task)


def text_of(task):
    """The manifest of a task's text, if it has one."""
    dataset = STUDY.tasks[task].dataset_name()
    return manifest_of(dataset) if dataset else []


def manifest_of(dataset):
    """The manifest of a data set; those of the user's own files belong to the study alone.

    Files that were edited since are read again, and then the manifest's time counts: what depends
    on them would otherwise wait for the next run.
    """
    if dataset not in STUDY.datasets:
        return ancient(f"<cache>/data/{dataset}/manifest.json")
    file = f"<results>/texts/{dataset}/manifest.json"
    return ancient(file) if is_read(STUDY.datasets[dataset], resolved(file)) else file


def timed_text(wildcards):
    """The text whose pieces are timed as prompts: what the study calibrates with, its test part."""
    return manifest_of(STUDY.calibration.dataset)
