"""The module form of a mixture of experts: the layer and its routers."""
