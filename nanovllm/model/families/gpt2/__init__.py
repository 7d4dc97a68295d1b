"""GPT-2 (Radford et al. 2019), and what is trained in its shape.

config   reads its config.json
tensors  names, shapes and places of its tensors
network  its parts of the forward pass: embed, self_attention, feed_forward
"""
