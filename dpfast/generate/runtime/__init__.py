"""How the steps run on a machine, whatever they compute.

execution  a sampler's steps: eager, compiled, captured
regional   compilation of a transformer's blocks instead of whole steps
graphs     capture and replay of CUDA graphs
compiling  whether compiling pays
batching   how many samples go into a batch
probing    what a sampler finds out about its models before it samples
"""
