"""What the notebooks share: loading, generating, comparing. Each module imports only from the floors below it.

5  love_hate, figures      the one experiment through any mechanism; the figures a model must show
4  mechanisms              the notebooks' own cells as callables
3  generation              completions, sampling, logits
2  pristine                is this model as it was?
1  models, blocks, positions, embedded    load; find a block in any model; positions from a mask; the small model

Two modules stand beside the floors: colab writes the badge and the first cell of every notebook, and notebooks runs
them and stores their outputs.
"""
