"""What transformers are made of, in closed form: layer normalization, softmax, GELU and SiLU.

`_layer_norm` finds regions of the graph, as `_fusion` does for batch normalization; `_softmax` has
JVP rules; `_activations` has derivatives that rules for pointwise operations look up.
"""
