"""Every architecture that libraries of models ship, against one device: ``python -m sptransform.sweep``.

Architectures come from the libraries' own registries and are built from their own default configurations, made small
by one rule (`shrinking.py`). Their inputs are made from the signature of forward (`inputs.py`). No model is named here.
"""
