"""What the notebooks share: loading, generating, comparing. Each module imports only from the floors below it.

5  love_hate figures sweeps           the experiment through any mechanism; figures a model must show; grids
4  mechanisms                         the notebooks' own cells as callables
3  generation metrics                 completions, sampling, logits; the tone of a text
2  pristine                           is this model as it was?
1  models blocks positions embedded baukit_standin    load; find a block in any model; positions from a mask

Beside the floors stand commands that nobody imports from below: `notebooks` runs the notebooks and stores their outputs,
`colab` writes their badge and first cell, `embedded.train`, `embedded.sweep` and `embedded.evaluate` make and measure the
embedded model.
"""
