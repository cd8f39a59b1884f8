"""The columns of TensorBoard's HPARAMS are those of all runs that it is opened on.

TensorBoard takes them from the first run that it meets. It reads them through a provider of data; this one says of each
run the columns of all: the settings of any row, and the metrics of any run, in the order of the newest.
"""

from copy import copy
from typing import Any


def plugins() -> list[Any]:
    """TensorBoard's plugins, HPARAMS with the columns of all runs."""
    from tensorboard import default
    from tensorboard.plugins.base_plugin import BasicLoader
    from tensorboard.plugins.hparams.hparams_plugin import HParamsPlugin

    class Loader(BasicLoader):
        """TensorBoard's own plugin, which reads through ``Together``."""

        def load(self, context: Any) -> Any:
            own = copy(context)
            own.data_provider = Together(context.data_provider)
            return self.plugin_class(own)

    return [Loader(plugin) if plugin is HParamsPlugin else plugin for plugin in default.get_plugins()]


class Together:
    """A provider of TensorBoard's data, but for what runs say of the columns of HPARAMS."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def list_tensors(self, ctx: Any = None, *, experiment_id: str, plugin_name: str, run_tag_filter: Any = None) -> Any:
        """Its tensors by run and tag."""
        from tensorboard.plugins.hparams import metadata

        found = self._inner.list_tensors(
            ctx, experiment_id=experiment_id, plugin_name=plugin_name, run_tag_filter=run_tag_filter
        )
        told = {run: tags for run, tags in found.items() if metadata.EXPERIMENT_TAG in tags}
        if plugin_name != metadata.PLUGIN_NAME or not told:
            return found
        page = _page(found, told)
        return {run: _with(tags, metadata.EXPERIMENT_TAG, page) if run in told else tags for run, tags in found.items()}


def _with(tags: dict[str, Any], tag: str, content: bytes) -> dict[str, Any]:
    """The tags of a run, one with other content."""
    from tensorboard.data.provider import TensorTimeSeries

    old = tags[tag]
    new = TensorTimeSeries(
        max_step=old.max_step,
        max_wall_time=old.max_wall_time,
        plugin_content=content,
        description=old.description,
        display_name=old.display_name,
    )
    return {**tags, tag: new}


def _page(found: dict[str, Any], told: dict[str, Any]) -> bytes:
    """What the page shows: the settings as TensorBoard itself finds them where no run says any, then the metrics."""
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import Experiment
    from tensorboard.plugins.hparams.backend_context import Context
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    start, tag = metadata.SESSION_START_INFO_TAG, metadata.EXPERIMENT_TAG
    rows = {run: {start: tags[start].plugin_content} for run, tags in found.items() if start in tags}
    page: Experiment = Context(None).experiment_from_metadata(None, "", False, rows, [])
    newest = sorted((tags[tag] for tags in told.values()), key=lambda held: -(held.max_wall_time or 0))
    experiments = [metadata.parse_experiment_plugin_data(held.plugin_content) for held in newest]
    titles = {info.name: info for one in reversed(experiments) for info in one.hparam_infos}
    for info in page.hparam_infos:
        if info.name in titles:
            info.display_name, info.description = titles[info.name].display_name, titles[info.name].description
    seen = set()
    for metric in (metric for one in experiments for metric in one.metric_infos):
        name = (metric.name.group, metric.name.tag)
        if name not in seen:
            page.metric_infos.append(metric)
        seen.add(name)
    return metadata.create_summary_metadata(HParamsPluginData(experiment=page)).plugin_data.content
