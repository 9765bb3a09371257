"""The main job on real data: ``python -m riemann_unn.demo`` trains an RNN beside an LSTM.

``tasks`` makes the data, ``models`` the two learners, ``training`` runs and checkpoints them,
``plots`` draws the picture, and ``__main__`` is the command line.
"""
