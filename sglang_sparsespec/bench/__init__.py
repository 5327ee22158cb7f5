"""The benchmark: every rival on the same weights, prompts and machine, in one run. docs/benchmarks.md is its manual.

Servers run as processes; nothing here imports SGLang. From the command line down:

* ``cli``, ``sets``, ``workloads``, ``contenders``   what to measure, and what this machine cannot
* ``cells``, ``planner``                             the identity of a measurement, order, predicted minutes
* ``runner``, ``gate``, ``parity``, ``measure``      servers up, output compared, turns taken and recorded
* ``server``, ``client``, ``prompts``, ``machine``   a server as a `with` block, streamed requests, what there is
* ``window``, ``summary``, ``cost_model``            pure: steady state, medians and ratios, what a round should take
* ``records``, ``report``, ``model_check``, ``plots``  the file of results, and what is made from it
"""
