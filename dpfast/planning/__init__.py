"""The cost of a run in FLOPs, bytes and hours, and the limits that a device's peaks set.

architectures  generators without weights, on the meta device
methods        FLOPs of a guided sample by the way its gradient is made
training       a learner's training and evaluation, counted
stages         the stages of a recipe, counted
memory         what a device holds while each phase goes on
fitting        a recipe fitted to the memory of its devices
network        what ranks send each other takes
simulation     a run on many ranks, in turns or side by side
disk           what a run writes
measure        the stages of a recipe timed on this machine
plan           a recipe on a number of devices: `dpfast plan`
table          a plan as text
"""
