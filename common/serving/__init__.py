"""Serving: the same steering in engines other than transformers.

vLLM, each request with its own steering:

    requests        what a request asks for: read, checked, salted
    slices          which rows of a step are steered, from what the scheduler hands out
    counting        steered tokens x layers, as asked and as done
    offers          the vectors and additions that an engine is started with
    deltas          what is added to the rows of a step
    bodies          what a server is sent: steering in the wrong place is refused
    vllm_plugin     the checks at start and of every request; how an engine is started
    vllm_scheduler  a request whose count is wrong fails
    vllm_worker     the layers that add

vLLM imports the last three, and they use it; the others need no engine.

llama.cpp, one steering for a context:

    gguf_model      the model as GGUF
    llama_cpp       the vector as a control vector of a running model
"""
