"""`./launch.sh [launcher flags] [RECIPE] [recipe flags]` as a DeepSpeed launch, or one line that says what to fix.

DeepSpeed's launcher answers a bad hostfile or a busy port with a traceback, starts more ranks than there are GPUs, and
leaves the ranks running when it is stopped. So the flags are split and checked here, and the recipe by
`mnemos check`, before a rank exists or a file is written; then its launcher is supervised.

    request.py     the words, split and checked one by one
    hosts.py       hostfiles and slots
    layout.py      the layout of the ranks, and whether they can start
    remote.py      what reaches other nodes: the environment, quoted words
    supervise.py   signals and exit codes while it runs
    ranks.py       the rank processes of a launch on one machine

Standard library only, apart from psutil: this runs before every launch.
"""
