"""The demos on real data: ``python -m riemann_unn.demo --help`` lists them.

``__main__`` reads the command line (``cli``), runs an ``experiment``, prints its table and draws
its picture. ``memory``, ``conv``, ``convrnn``, ``lipschitz``, ``warmstart``, ``rescale`` and
``lowrank`` are the experiments, each with its ``_plots``. ``tasks``, ``images``, ``sequences`` and
``data`` give what is learned from, ``models`` and ``conv_models`` what learns; ``training`` trains,
``checkpoint`` keeps what is done, and ``progress`` tells how far it is.
"""
