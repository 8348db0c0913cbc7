"""The paper's figures and ours: tasks, drawing and captions, one module per figure.

Start with `fig2`. `_style` is their common look.
"""
