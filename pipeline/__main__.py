from pipeline.environment import set_up

set_up()  # before anything imports torch

from pipeline.cli import main  # noqa: E402

main()
