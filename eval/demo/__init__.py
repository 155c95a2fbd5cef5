"""``vlmfast demo``: a page on this machine that asks a model about a picture, without and with methods.

`answering.py` answers one request after the other, `answers.html` shows what came of it, `page.py` is the page in
Gradio, `serving.py` the command. Only the last two need Gradio.
"""
