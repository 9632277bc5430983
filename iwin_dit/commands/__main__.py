"""``iwin-dit`` as a module: ``accelerate launch -m iwin_dit.commands train`` starts it on each GPU."""

from iwin_dit.commands import main

main()
