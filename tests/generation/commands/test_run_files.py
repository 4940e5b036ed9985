"""Every shipped run file of LaytonGen fits the real signatures."""

from __future__ import annotations

from pathlib import Path

import pytest

from layton.cli import main

CONFIGS = Path(__file__).parents[3] / "configs"
RUNS = [
    (CONFIGS / "mini" / "laytongen.yaml", "scenes_latents"),
    (CONFIGS / "mini" / "laytongen.yaml", "scenes_tokens"),
    (CONFIGS / "mini" / "laytongen_plain.yaml", "scenes_tokens_plain"),
    (CONFIGS / "mini" / "laytongen_windows.yaml", "scenes_windows"),
    (CONFIGS / "mini" / "laytongen_windows.yaml", "scenes_tokens_windows"),
    (CONFIGS / "mini" / "laytongen_contrast.yaml", "scenes_tokens_contrary"),
    (CONFIGS / "mini" / "laytongen_foresight.yaml", "scenes_tokens_ahead"),
    (CONFIGS / "mini" / "laytongen_layout.yaml", "scenes_tokens_layout"),
    (CONFIGS / "mini" / "laytongen_planner.yaml", "scenes_layouts"),
    (CONFIGS / "mini" / "laytongen_reward.yaml", "scenes_reward_prompts"),
    (CONFIGS / "mini" / "laytongen_reward.yaml", "scenes_tokens_reward"),
    (CONFIGS / "mini" / "judge.yaml", "scenes_tokens_judge"),
    (CONFIGS / "mini" / "judge_drawn.yaml", "scenes_tokens_judge_drawn"),
    *((path, "tokens") for path in sorted((CONFIGS / "laytongen").glob("*.yaml"))),
]


@pytest.mark.parametrize(("path", "data"), RUNS, ids=lambda value: getattr(value, "stem", value))
def test_run_files_parse(path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(path), "--data", str(CONFIGS / "data" / f"{data}.yaml"), "--print_config"]
    assert main(["fit", *arguments]) == 0
    written = capsys.readouterr().out
    kinds = {
        "reward": "tasks.reward.LaytonGenRewardTask",
        "judge": "tasks.judge.JudgeTask",
        "scenes_layouts": "tasks.planner.LayoutPlannerTask",
    }
    task = next((name for word, name in kinds.items() if word in data), "tasks.laytongen.LaytonGenTask")
    assert f"class_path: generation.{task}" in written
    assert ("class_path: generation.data.source.TokenShards" in written) == ("tokens" in data)
