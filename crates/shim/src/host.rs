//! The boundary that is the node's own kernel: the agent as a process of the node.
//!
//! The agent and all containers are in the pod's cgroup, and that is what ends them: the agent first
//! ends and undoes the containers by itself when its connection closes, also when that is because the
//! shim died; whatever is left in the cgroup after that is killed. Mounts are in the shim's mount
//! namespace and go with it.

use crate::{boundary::Owner, child::WatchedChild};
use a3s_box_sys::{
    cgroup::{Cgroup, Hierarchies},
    duplex::Duplex,
    spawn::Spawn,
};
use a3s_box_types::shim::{CgroupName, HostConfig};
use anyhow::Context;
use std::{
    fs, io,
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::{Duration, Instant},
};

/// Folder of the agent's small files in the shim's.
const RUNTIME_DIR: &str = "agent";
/// The supervisors' cgroup below the pod's, beside those of the containers.
const SUPERVISORS: &str = "supervisors";
/// How long the agent may take to end the containers by itself.
const GRACE: Duration = Duration::from_secs(3);
/// How long killed processes may take to be gone.
const KILL_WAIT: Duration = Duration::from_secs(10);
/// Between two looks at them.
const POLL: Duration = Duration::from_millis(5);
/// Descriptors that the agent inherits.
const SOCKET: i32 = 3;
const NETNS: i32 = 4;
const MOUNTS: i32 = 5;

/// What the agent is started with.
#[derive(Debug)]
pub struct Parts {
    /// The order.
    pub config: HostConfig,
    /// The pod's cgroup, which the shim has made ready.
    pub cgroup: Cgroup,
    /// The pod's network namespace, if it has one of its own.
    pub netns: Option<OwnedFd>,
    /// The node's mount namespace.
    pub mounts: OwnedFd,
}

/// The pod's cgroup; moves the shim in it to where supervisors are.
pub fn cgroup(name: &CgroupName) -> anyhow::Result<Cgroup> {
    let hierarchies = Hierarchies::find().context("find the node's cgroups")?;
    let cgroup = Cgroup::new(hierarchies, &name.parent, &name.name);
    cgroup.enter_below(SUPERVISORS).context("enter the supervisors' cgroup")?;
    Ok(cgroup)
}

/// From start to end; why it ended.
pub async fn live(owner: &mut Owner, parts: Parts) -> anyhow::Result<String> {
    let Parts { config, cgroup, netns, mounts } = parts;
    let (ours, theirs) = UnixStream::pair().context("make the agent's socket")?;
    let connection = ours.try_clone().context("make the agent's socket")?;
    fs::create_dir_all(&config.scratch)
        .with_context(|| format!("make {}", config.scratch.display()))?;
    let mut spawn = spawn(&config, &cgroup, &owner.folder, theirs, netns)?;
    spawn.arg("--node-mounts").arg(MOUNTS.to_string()).fd(mounts, MOUNTS);
    let what = || format!("start the agent {}", config.agent.display());
    let mut agent = WatchedChild::start(spawn).with_context(what)?;
    owner.reached("agent_spawned");
    owner.started(agent.pid(), |processes| &mut processes.agent)?;
    let stream = async { Ok(Duplex::new(ours)?) };
    let why = owner.serve(stream, agent.ended("agent")).await;
    // Clients still hold the stream: this hangs up for all of them. Nobody may be at the other end.
    connection.shutdown(Shutdown::Both).ok();
    tokio::time::timeout(GRACE, agent.ended("agent")).await.ok();
    kill_others(&cgroup).await?;
    Ok(why)
}

fn spawn(
    config: &HostConfig,
    cgroup: &Cgroup,
    folder: &Path,
    socket: UnixStream,
    netns: Option<OwnedFd>,
) -> anyhow::Result<Spawn> {
    let v2 = cgroup.v2().context(
        "the node has no cgroup v2 hierarchy, which pods on its kernel need: \
         mount one (mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified)",
    )?;
    let mut agent = Spawn::new(&config.agent);
    // Host paths are what the agent's paths below the share are.
    agent.arg("--socket").arg(SOCKET.to_string()).arg("--share").arg("/");
    agent.arg("--scratch").arg(&config.scratch).arg("--runtime").arg(folder.join(RUNTIME_DIR));
    agent.arg("--cgroups").arg(v2);
    for (controller, folder) in cgroup.v1() {
        agent.arg("--cgroup-v1").arg(format!("{controller}={}", folder.display()));
    }
    if config.own_ipc {
        agent.arg("--own").arg("ipc");
    }
    agent.fd(socket, SOCKET);
    if let Some(netns) = netns {
        // A host name is a name in the network.
        agent.arg("--own").arg("uts").arg("--netns").arg(NETNS.to_string()).fd(netns, NETNS);
    }
    agent.output = Some(io::stderr().as_fd().try_clone_to_owned().context("share the log")?);
    Ok(agent)
}

/// Ends every process of the pod but the shim.
async fn kill_others(cgroup: &Cgroup) -> anyhow::Result<()> {
    let since = Instant::now();
    loop {
        cgroup.kill_others().context("kill the pod's processes")?;
        let left = cgroup.processes().context("look for the pod's processes")?;
        if left.iter().all(|pid| *pid == std::process::id()) {
            return Ok(());
        }
        anyhow::ensure!(since.elapsed() < KILL_WAIT, "killed processes do not go: {left:?}");
        tokio::time::sleep(POLL).await;
    }
}
