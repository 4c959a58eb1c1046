"""The program, its operators and their text.

Shape letters: T tokens, D model width, F hidden width, E experts, K chosen, R rows (token copies, R = T * K).
"""
