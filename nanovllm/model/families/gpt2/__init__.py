"""GPT-2 (Radford et al. 2019), and what is trained in its shape.

config   reads its config.json
tensors  names, shapes and places of its tensors
network  its forward pass: embed, block, self_attention, feed_forward
"""
