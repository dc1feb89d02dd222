//! The double for nodes that are called of class `cuda` and have no GPU: what is tested is where a job goes.

fn main() -> anyhow::Result<()> {
    joulecast_cuda_double::become_runtime(|| Ok(()))
}
