"""Door 2: visual tokens dropped between decoder layers.

`door` what is installed · `prefill` a prompt on its way through the layers · `later` tokens after it · `tokens` what a
method sees · `scores` the attention it reads · `cache` what every layer holds · `rotary` positions behind a cut.
"""
