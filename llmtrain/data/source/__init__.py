"""Kinds of corpora: the module ``<kind>.py`` defines the :class:`Corpus` of that kind."""
