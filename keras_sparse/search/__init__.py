"""Search finds where a network can be sparse: a space of allocations, searchers, and the evaluation of candidates."""

from keras_sparse.search import pareto, searchers, space
from keras_sparse.search.results import Candidate, SearchResults
from keras_sparse.search.run import search
from keras_sparse.search.searchers import Evolution, RandomSearch, Reinforce, Searcher
from keras_sparse.search.space import Space

__all__ = [
    "Candidate",
    "Evolution",
    "RandomSearch",
    "Reinforce",
    "SearchResults",
    "Searcher",
    "Space",
    "pareto",
    "search",
    "searchers",
    "space",
]
