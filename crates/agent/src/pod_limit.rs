//! What the pod's containers may use together, and which limit it was that killed one.
//!
//! In a guest all containers' cgroups lie in one, whose limit follows the pod's when it is resized. On
//! the node's own kernel the pod's cgroup is kubelet's, and nothing is done here.

use crate::{
    agent::{Agent, blocking},
    cgroup::{self, Cgroup},
    config::{Boundary, Config},
    error::{Error, Step},
};
use a3s_box_api::agent::v1 as api;
use std::{fs, path::Path, sync::Arc};

const MIB: u64 = 1 << 20;

/// Limits all containers together; an error, and the old limit, when they use more.
pub async fn limit(
    agent: &Arc<Agent>,
    request: &api::LimitPodRequest,
) -> Result<api::LimitPodResponse, Error> {
    if agent.config.boundary != Boundary::Guest {
        return Err(Error::Unsupported("a limit of the whole pod outside a guest".to_owned()));
    }
    let (folder, bytes) = (agent.config.cgroups.clone(), request.memory_bytes);
    blocking(move || {
        if bytes > 0 {
            make_room(&folder, bytes)?;
        }
        let value = if bytes > 0 { bytes.to_string() } else { "max".to_owned() };
        fs::write(folder.join("memory.max"), &value).step(format_args!("memory.max = {value}"))
    })
    .await?;
    Ok(api::LimitPodResponse {})
}

/// Gives caches back until the limit fits: a limit below what is used would kill.
fn make_room(folder: &Path, limit: u64) -> Result<(), Error> {
    let used = || cgroup::count(&folder.join("memory.current"), "");
    let before = used();
    if before > limit {
        // Fails when it gives back less than asked for; what is left says whether that is enough.
        drop(fs::write(folder.join("memory.reclaim"), (before - limit).to_string()));
    }
    match used() {
        now if now > limit => Err(Error::NotNow(format!(
            "the pod's containers use {} MiB, which is more than a limit of {} MiB",
            now.div_ceil(MIB),
            limit / MIB
        ))),
        _ => Ok(()),
    }
}

/// Why a container ended, as far as its and the pod's memory tells.
pub fn cause_of_end(config: &Config, container: &Cgroup) -> api::ExitCause {
    if container.oom_kills() == 0 {
        return api::ExitCause::Process;
    }
    if container.reached_its_limit() {
        return api::ExitCause::ContainerLimit;
    }
    // What happened below does not count in this file.
    let pods = config.cgroups.join("memory.events.local");
    if config.boundary == Boundary::Guest && cgroup::count(&pods, "oom ") > 0 {
        return api::ExitCause::PodLimit;
    }
    api::ExitCause::KernelMemory
}
