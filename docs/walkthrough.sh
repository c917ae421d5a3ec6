#!/usr/bin/env bash
# A year of quarterly versions, as docs/walkthrough.md tells it. A test runs these lines on small data.
#
#   DATA=folder with q1 q2 q3 q4 (prepared)  CONFIG=year.yaml (slice q1)  RUN=runs/year  STEPS=700  bash docs/walkthrough.sh
#
# BORDER is the step at which the second quarter ends: twice STEPS.
set -euo pipefail
BORDER=$((2 * STEPS))

# Before the year: what will four versions cost?
velopath plan --versions 4 --steps "$STEPS" --alpha 0.6 --png "$RUN-plan.png" --csv "$RUN-plan.csv"

# First quarter: the main path, its branch, an export.
velopath run "$CONFIG" --run "$RUN"

# Second quarter: more data of the same domains.
velopath data add "$RUN" q2 "$DATA/q2" --steps "$STEPS"
velopath run "$RUN"
velopath diff "$RUN" v1 v2
velopath train "$RUN" --until "$BORDER"

# Third quarter: a new domain alone. The old ones are forgotten, and health says so.
velopath data add "$RUN" q3 "$DATA/q3" --steps "$STEPS"
velopath train "$RUN"
! velopath health "$RUN"

# Back to the end of the second quarter, the same data again, with a third of old text.
velopath rollback "$RUN" "$BORDER"
velopath data add "$RUN" q3-replayed "$DATA/q3" --steps "$STEPS" --replay 0.35
velopath train "$RUN"
velopath forecast "$RUN"
velopath run "$RUN"

# Fourth quarter: everything.
velopath data add "$RUN" q4 "$DATA/q4" --steps "$STEPS"
velopath run "$RUN"

# The end of the year: what came from what, at what cost; tidy up.
velopath log "$RUN"
velopath log "$RUN" --mermaid
velopath plan --actual "$RUN"
velopath report "$RUN"
velopath gc "$RUN"
velopath gc "$RUN" --yes
velopath verify "$RUN"
