// Launches of the engine: in order, or one beginning before the one ahead of it has run.
#include "engine_state.h"

namespace qlk::emulation {

namespace {

constexpr int kMaxQueued = 4;
// The oldest has nothing to wait for; each of the others overlaps the one ahead of it.
QueuedLaunch queue[kMaxQueued];
int n_queued = 0;

void run(int number) {
  run_grid(queue[number], number - 1);
  queue[number].destroy(queue[number].context);
}

}  // namespace

void enqueue(const QueuedLaunch& launch) {
  if (!launch.overlaps) synchronize();
  if (n_queued == kMaxQueued) fail("more than %d launches that overlap", kMaxQueued);
  queue[n_queued++] = launch;
}

void synchronize() {
  if (n_queued > 0) run(n_queued - 1);
  n_queued = 0;
}

void run_primary(int primary) { run(primary); }

void wait_for_primary() {
  machine->has_waited = true;
  if (machine->primary >= 0) {
    running->state = State::kAwaitsPrimary;
    to_scheduler();
  }
  if (machine->primary_sync) acquire(machine->primary_sync);
}

}  // namespace qlk::emulation
