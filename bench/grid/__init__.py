"""Every op × backend × format × dtype × layer × number of tokens, beside its peers.

`points` chooses what is measured, `codecs` and `matmuls` say what one point does, moves and
computes, `peers` what it is compared with, `sweep` measures.
"""
