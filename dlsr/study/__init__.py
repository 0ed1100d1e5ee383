"""The study "Does diffusion help?": baselines, other scores, and the comparison of them all.

It imports `dlsr`, and only the chapter's notebooks import it.
"""
