"""HLWQ models in PyTorch: transformers integration and Triton kernels."""
