"""CLEVRER's questions: their programs, what answers these from the truth, their files, and new questions of each type.

``programs`` reads, checks and prints programs; ``executor`` answers one from an ``objdyn.clevrer.World``; ``records``
is CLEVRER's question JSON; ``generator`` asks questions about a World.
"""
