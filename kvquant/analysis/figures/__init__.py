"""The figures of the paper, a module per figure; :mod:`kvquant.analysis.figure_list` lists them."""
