//! Another size for a machine that runs.
//!
//! ```text
//! grow:    processors and memory are plugged in  ->  the containers' limit rises
//! shrink:  the limit falls, or the call is refused  ->  memory is taken as the guest can spare it,
//!          and processors are used no more
//! ```

use crate::service::Shim;
use a3s_box_api::{
    agent::v1::{self as agent, agent_client::AgentClient},
    shim::v1 as shim,
};
use a3s_box_types::shim::{BoundaryConfig, ShimConfig, VmSize};
use a3s_box_vmm::{Hardware, MoreMemory};
use std::{
    io::ErrorKind,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};
use tonic::{Status, transport::Channel};

/// A guest adds half a gigabyte within half a second translated; a busy host may need much longer.
const GROW_PATIENCE: Duration = Duration::from_secs(60);
/// It moves what is in the way first. What takes longer goes on without being waited for.
const SHRINK_PATIENCE: Duration = Duration::from_secs(20);
/// For a machine that is only asked.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(10);

/// Does it; one at a time.
pub async fn resize(
    shim: &Shim,
    request: shim::ResizeRequest,
) -> Result<shim::ResizeResponse, Status> {
    let _alone = shim.resizing.lock().await;
    let mut agent = shim.boundary.agent().await?;
    let (Some(hardware), Some(start_mb)) = (shim.boundary.hardware(), shim.start_memory_mb())
    else {
        return Err(Status::failed_precondition("there is no machine to resize"));
    };
    let had = shim.vcpus.load(Ordering::Relaxed);
    let vcpus = if request.vcpus == 0 { had } else { request.vcpus };
    if vcpus > had {
        hardware.plug_processors(vcpus).await.map_err(|err| match err.kind() {
            ErrorKind::InvalidInput => Status::resource_exhausted(err.to_string()),
            _ => failed(&err),
        })?;
        use_processors(shim, &mut agent, vcpus).await?;
    }
    let resized = resize_memory(&hardware, &mut agent, start_mb, &request).await;
    let vcpus = if resized.is_ok() { vcpus } else { had };
    if vcpus < shim.vcpus.load(Ordering::Relaxed) {
        use_processors(shim, &mut agent, vcpus).await?;
    }
    resized?;
    Ok(shim::ResizeResponse { memory_mb: shim.memory_mb().await })
}

async fn use_processors(
    shim: &Shim,
    agent: &mut AgentClient<Channel>,
    count: u32,
) -> Result<(), Status> {
    agent.set_processors(agent::SetProcessorsRequest { count }).await?;
    shim.vcpus.store(count, Ordering::Relaxed);
    Ok(())
}

async fn resize_memory(
    hardware: &Hardware,
    agent: &mut AgentClient<Channel>,
    start_mb: u32,
    request: &shim::ResizeRequest,
) -> Result<(), Status> {
    let limits = request.limits.unwrap_or_default();
    let wanted = request.memory_mb.saturating_sub(start_mb);
    let before = hardware.more_memory().await.map_err(|err| failed(&err))?;
    if wanted > before.wanted_mb {
        grow(hardware, before, wanted).await?;
        agent.limit_pod(limits).await?;
    } else {
        agent.limit_pod(limits).await?;
        ask(hardware, wanted, SHRINK_PATIENCE).await?;
    }
    Ok(())
}

async fn grow(hardware: &Hardware, before: MoreMemory, wanted: u32) -> Result<(), Status> {
    let now = ask(hardware, wanted, GROW_PATIENCE).await?;
    if now.there_mb >= wanted {
        return Ok(());
    }
    ask(hardware, before.wanted_mb, Duration::ZERO).await?;
    let (added, asked) = (now.there_mb - before.there_mb, wanted - before.there_mb);
    let within = GROW_PATIENCE.as_secs();
    Err(Status::resource_exhausted(format!(
        "the guest took {added} MiB of {asked} MiB more memory within {within} s; it keeps its size"
    )))
}

/// Asks for so much and waits until it is so, or `patience` is over.
async fn ask(hardware: &Hardware, wanted: u32, patience: Duration) -> Result<MoreMemory, Status> {
    let since = Instant::now();
    let mut now = hardware.ask_for_memory(wanted).await.map_err(|err| failed(&err))?;
    while now.there_mb != now.wanted_mb && since.elapsed() < patience {
        tokio::time::sleep(POLL).await;
        now = hardware.more_memory().await.map_err(|err| failed(&err))?;
    }
    Ok(now)
}

fn failed(err: &std::io::Error) -> Status {
    Status::internal(format!("resize the virtual machine: {err}"))
}

impl Shim {
    /// What the machine has; 0 when there is none.
    pub async fn memory_mb(&self) -> u32 {
        let (Some(hardware), Some(start_mb)) = (self.boundary.hardware(), self.start_memory_mb())
        else {
            return 0;
        };
        let asked = tokio::spawn(async move { hardware.more_memory().await });
        // A machine that hangs, or has just ended, has nothing more.
        let more = tokio::time::timeout(ANSWER_PATIENCE, asked).await;
        let more = more.ok().and_then(Result::ok).and_then(Result::ok).unwrap_or_default();
        start_mb + more.there_mb
    }

    fn start_memory_mb(&self) -> Option<u32> {
        start_size(&self.config).map(|size| size.memory_mb)
    }
}

/// What the machine is started with; none where there is no machine.
pub fn start_size(config: &ShimConfig) -> Option<VmSize> {
    match &config.boundary {
        BoundaryConfig::Microvm(config) => Some(config.vm.size),
        BoundaryConfig::Host(_) => None,
    }
}
