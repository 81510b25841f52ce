"""Train, validate, test and use an image classifier.

    uv run train.py fit --config configs/quickstart.yaml

Commands: fit, validate, test, predict, tune; `uv run train.py fit --help` lists every key. Keys
come from the config files, in the order of the command line, and then from the command line
itself; later ones win: `--model.lr 3e-4 --trainer.max_epochs 10`.
"""

if __name__ == "__main__":
    from visattn.training.cli import main

    main()
