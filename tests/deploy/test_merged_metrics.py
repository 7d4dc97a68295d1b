"""The metrics of several replicas become one page."""

from prometheus_client.parser import text_string_to_metric_families

from nanovllm.deploy.merged_metrics import merge_metrics
from nanovllm.server.metrics import ServerMetrics


def test_pages_of_metrics_are_merged() -> None:
    page = '# HELP a_total b c\n# TYPE a_total counter\na_total{x="y"} 1.0\nplain 2\n'
    assert merge_metrics([("r", page), ("s", page)]) == (
        '# HELP a_total b c\n# TYPE a_total counter\na_total{replica="r",x="y"} 1.0\n'
        'plain{replica="r"} 2\na_total{replica="s",x="y"} 1.0\nplain{replica="s"} 2\n'
    )


def test_no_page_is_an_empty_page() -> None:
    assert merge_metrics([]) == ""


def test_the_pages_of_servers_with_any_name_are_merged() -> None:
    names = ["plain", 'quotes " and } braces {', "line\nbreak \u2028 \x85 \\"]
    pages = [
        (str(index), ServerMetrics(name).render().decode()) for index, name in enumerate(names)
    ]
    families = list(text_string_to_metric_families(merge_metrics(pages)))
    labels = [sample.labels for family in families for sample in family.samples]
    assert {(each["replica"], each["model_name"]) for each in labels if "model_name" in each} == {
        (str(index), name) for index, name in enumerate(names)
    }
    assert len({family.name for family in families}) == len(families)
