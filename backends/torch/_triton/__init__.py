"""Triton kernels. Nothing here has run on a GPU yet: the tests run the kernels in Triton's interpreter, and
:mod:`sa_softmax.backends.torch._triton.compile_check` compiles them for the GPUs that it names.

Importing this package imports no Triton; its modules do.
"""
