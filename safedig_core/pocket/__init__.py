"""The pocket testbed: small models that ship whole."""

MODELS = ("pocket-flux",)  # whose weights ship; train.py makes the other as well
