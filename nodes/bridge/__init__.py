"""Between nodes and the core: all that knows ComfyUI."""
