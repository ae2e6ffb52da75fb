"""How a weight is carried in a graph: which tensors are stored, how they are made, which nodes use them.

One file per format; each is a frozen record with the methods of :class:`WeightFormat`.
"""
