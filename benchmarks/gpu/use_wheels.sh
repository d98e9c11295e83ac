# To be sourced in the clone on a machine without network: the wheels of benchmarks/gpu/wheels.py before its own packages.
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "${SITE:=/tmp/site}" .whl/*.whl &&
  export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" &&
  python3 -c 'import harvest.run, train.run, evaluate.run, pipeline.cli' && echo 'harvest, train, evaluate and the command line can be imported'
