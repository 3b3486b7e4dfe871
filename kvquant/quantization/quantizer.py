"""A quantizer in memory: what calibration made, saved, read again and shared on a hub."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from kvquant.errors import UserError
from kvquant.fetch.hub import hub_errors, is_repository_id
from kvquant.formats.files import expand_home, make_folder
from kvquant.formats.layer_quantizer import LayerTables
from kvquant.quantization import quantizer_file
from kvquant.quantization.quantizer_card import NAME as CARD
from kvquant.quantization.quantizer_card import card, is_own, write_card
from kvquant.quantization.quantizer_file import (
    FIELD,
    QuantizerManifest,
    named_tensors,
    save_quantizer,
    scheme_of,
    tensors_path,
)
from kvquant.runtime.progress import note
from kvquant.study.scheme_kinds import CalibratedScheme

FILE = "quantizer.json"
FILES = (FILE, tensors_path(Path(FILE)).name)


@dataclass(frozen=True, eq=False, repr=False)
class Quantizer:
    """What a scheme's cache needs for one model: key ranges, widths and codebooks of every layer.

    :func:`kvquant.calibrate` makes it, :func:`kvquant.load` uses it. It fits the weights that it
    was built for, and is refused with others. Its files are safetensors and JSON, sealed by hashes;
    nothing is pickled.

    Attributes:
        manifest: What it was built from, and for: model, scheme, calibration, hashes.
        layers: The tables of each layer that sees all tokens, on the CPU.
        source: Where it was read from, as messages name it.
    """

    manifest: QuantizerManifest
    layers: Sequence[LayerTables]
    source: str = "the given one"

    @functools.cached_property
    def scheme(self) -> CalibratedScheme:
        """The scheme with its options."""
        return scheme_of(self.source, self.manifest)

    @property
    def bits(self) -> float:
        """The scheme's option `bits`: for allocated codes the mean bits of full blocks."""
        return self.scheme.bits

    @property
    def model(self) -> str:
        """The name of the model: its hub id, or that of its folder or class."""
        return self.manifest.model

    @functools.cached_property
    def tensors_sha256(self) -> str:
        """The sha256 that its safetensors file has, or would have."""
        if self.manifest.tensors_sha256:
            return self.manifest.tensors_sha256
        tensors = {name: t.cpu().contiguous() for name, t in named_tensors(self.layers).items()}
        return hashlib.sha256(save(tensors)).hexdigest()

    def __repr__(self) -> str:
        return (
            f"Quantizer({self.manifest.scheme!r} of {self.model!r}: {len(self.layers)} layers, "
            f"{self.bits:g} bits)"
        )

    def save(self, folder: str | Path) -> Path:
        """Writes the quantizer and a short README.md into a folder, which is made if need be.

        A README.md that you wrote yourself stays as it is.

        Args:
            folder: The folder; not that of a model, whose files it would change.

        Returns:
            The folder.

        Raises:
            UserError: The folder is a model's, or cannot be written.
        """
        return self._save(folder, None)

    def _save(self, folder: str | Path, repository: str | None) -> Path:
        if not isinstance(folder, str | Path) or not str(folder).strip():
            raise UserError(f"folder: must be the path of a folder, got {folder!r}")
        path = expand_home(str(folder), "folder")
        make_folder(path, "folder")
        if (path / "config.json").exists():
            raise UserError(
                f"folder: {path} is a model's folder (it has a config.json): choose another"
            )
        save_quantizer(path / FILE, self.manifest, self.layers)
        write_card(path, card(self.manifest, self.scheme, repository))
        return path

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Quantizer:
        """Reads a quantizer from a folder, its quantizer.json, or a hub repository.

        Args:
            source: The folder that :meth:`save` wrote, a path of a quantizer.json, or the id of a
                hub repository ("owner/name"). What exists as a path is read as one.
            revision: Branch, tag or commit of a hub repository; None: its main branch.
            token: Access token of the hub; None: the one that you are logged in with.

        Raises:
            UserError: A file is missing or damaged, its tables are not those of its JSON, or the
                hub cannot be reached.
        """
        path = expand_home(str(source), FIELD)
        if not path.exists() and path.suffix != ".json":
            path = _download(str(source), revision, token)
        elif revision is not None:
            raise UserError(f"revision: {path} is no hub repository; leave it out")
        elif path.is_dir():
            path = path / FILE
        manifest, layers = quantizer_file.load_quantizer(path, weights_sha256=None)
        return cls(manifest, layers, str(source))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload quantizer",
        create_pr: bool = False,
    ) -> str:
        """Uploads the quantizer and its card to a hub repository, which is made if need be.

        A README.md of the repository that you wrote yourself stays as it is.

        Args:
            repo_id: Id of the repository, "owner/name"; not that of a model's weights.
            private: Whether a new repository is private; None: the owner's default.
            token: Access token of the hub; None: the one that you are logged in with.
            revision: Branch to commit to; None: the main branch.
            commit_message: First line of the commit.
            create_pr: Whether to open a pull request instead.

        Returns:
            The URL of the commit.

        Raises:
            UserError: The repository holds a model, or the hub refuses or cannot be reached.
        """
        from huggingface_hub import HfApi, hf_hub_download

        if not is_repository_id(repo_id):
            raise UserError(f"repo_id: '{repo_id}' is not of the form owner/name")
        api = HfApi(token=token)
        with hub_errors(f"repo_id: hub repository {repo_id}", revision, "written"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if api.file_exists(repo_id, "config.json", revision=revision):
                raise UserError(
                    f"repo_id: {repo_id} is a model's repository (it has a config.json): choose "
                    "another, such as one named after the model and the scheme"
                )
            files = [*FILES, CARD]
            if api.file_exists(repo_id, CARD, revision=revision):
                found = hf_hub_download(repo_id, CARD, revision=revision, token=token)
                if not is_own(Path(found).read_text(encoding="utf-8", errors="replace")):
                    note(f"{repo_id}: has a {CARD} of yours, which stays as it is")
                    files.remove(CARD)
            with tempfile.TemporaryDirectory() as scratch:
                self._save(scratch, repo_id)
                done = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=scratch,
                    revision=revision,
                    commit_message=commit_message,
                    create_pr=create_pr,
                    allow_patterns=files,
                )
        return str(done.commit_url)


def load_quantizer(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> Quantizer:
    """Reads a quantizer from a folder, its quantizer.json, or a hub repository.

    The same as :meth:`Quantizer.from_pretrained`, whose arguments it has.
    """
    return Quantizer.from_pretrained(source, revision=revision, token=token)


def _download(source: str, revision: str | None, token: str | bool | None) -> Path:
    """Downloads the files of a quantizer from the hub; returns its quantizer.json."""
    from huggingface_hub import snapshot_download

    if not is_repository_id(source):
        raise UserError(f"{FIELD}: {source} is no folder, no quantizer.json and no hub id")
    where = f"{FIELD}: no such folder here, and hub repository {source}"
    with hub_errors(where, revision):
        folder = Path(
            snapshot_download(source, revision=revision, token=token, allow_patterns=list(FILES))
        )
    if not (folder / FILE).exists():
        raise UserError(f"{FIELD}: hub repository {source} holds no {FILE}")
    return folder / FILE
