"""Checks for steering code, your own included: what is wrong with it, and what it left behind.

Each check fails with a sentence that says what it found and what usually causes it. `model` is a
causal language model in evaluation mode. `steering` is a callable that returns a context manager,
for example `lambda: my_steer(model)`; it is opened anew for each pass. A check sees where steering
acts, whatever it is made of: it reads what each block gets and what the last one gives. For a model
that is not called as those of Hugging Face are, hand over the `logits(model, inputs)` and
`generate(model, inputs, **options)` of its mechanism, and your own to check how YOU run it. The
hooks of a check are gone afterwards, also when it fails. Whether steering left anything behind says
`assert_pristine`. The mistakes themselves are shown in guides/failures.ipynb.

All checks raise AssertionError for what they are there to find, and ValueError for arguments that
they cannot work with: a model in training mode, a tokenizer without a padding token, prompts
without tokens, steering that is not callable.
"""
