//! What a spare guest goes through: the life of a pod of ours, from its configuration to an exec in a
//! container. Whatever is slow only the first time (a translator's first sight of the code, the kernel's first
//! mount, a filter's compilation) has then been slow before the pod came.

use super::{SandboxError, blocking, configure::configure, spec::SandboxSpec};
use crate::{
    container_create::{ImageVolumes, prepare},
    container_spec::container_spec,
    node::ContainerImage,
    shim_client::{Detail, ShimClient},
};
use a3s_box_api::{
    agent::v1::{self as agent, exec_input, exec_output},
    cri,
};
use a3s_box_lane::{
    Mark,
    frame::{Kind, Reader, Writer},
    lease::Lane,
};
use a3s_box_sys::duplex::Duplex;
use a3s_box_types::{
    SandboxId,
    network::{GuestNetwork, Interface, Neighbour, Route},
};
use oci_spec::image::ImageConfiguration;
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::sync::OnceCell;
use tokio_stream::StreamExt;

/// The agent's name in its image, and the word that makes it the rehearsal's program.
const PROGRAM: [&str; 2] = ["/agent", "rehearse"];
const EXEC_TIMEOUT: Duration = Duration::from_secs(60);
/// Keys until a translator has seen all of their way.
const KEYS: usize = 8;
/// In the folder of rehearsals: the image's only layer.
const LAYER_FILE: &str = "agent.erofs";

/// The play.
#[derive(Debug)]
pub struct Rehearsal {
    agent: PathBuf,
    folder: PathBuf,
    layer: OnceCell<PathBuf>,
}

impl Rehearsal {
    /// With containers that run the program `agent`; what they need is made in `folder`.
    pub fn new(agent: &Path, folder: &Path) -> Self {
        let (agent, folder) = (agent.to_owned(), folder.to_owned());
        Self { agent, folder, layer: OnceCell::new() }
    }

    /// Plays it in the guest of this shim, which is as good as new afterwards.
    pub async fn run(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        shim: &ShimClient,
    ) -> Result<(), SandboxError> {
        let layer = self.layer.get_or_try_init(|| self.pack()).await?.clone();
        let mut order = configure(id, spec, &network());
        order.rehearsal = true;
        shim.configure(order).await?;

        let logs = self.folder.join(id.as_str());
        let spec = SandboxSpec { log_directory: logs.display().to_string(), ..spec.clone() };
        let container = container(&logs);
        let sandbox_id = id.clone();
        let new = blocking("prepare the rehearsal's container", move || {
            let container = container_spec(&container, &spec)?;
            prepare(&sandbox_id, container, &spec, &image(layer), &ImageVolumes::new())
        })
        .await?;
        let container = new.record.id.to_string();
        shim.create_container(new.order).await?;
        shim.start_container(&container).await?;
        let ran = shim.exec_sync(&container, program(None), Some(EXEC_TIMEOUT)).await?;
        if ran.exit_code != 0 {
            let why = format!(
                "exit code {}: {}",
                ran.exit_code,
                String::from_utf8_lossy(&ran.stderr).trim()
            );
            return Err(SandboxError::step("run the rehearsal's command", why));
        }
        if let Some(lane) = shim.borrow_lane().await {
            type_keys(shim, &container, lane).await?;
        }
        shim.stats(Vec::new(), Detail::Plain).await?;
        shim.remove_container(&container).await?;
        blocking("remove the rehearsal's files", move || removed(fs::remove_dir_all(&logs))).await
    }

    /// An image with the agent and nothing else.
    async fn pack(&self) -> Result<PathBuf, SandboxError> {
        const STEP: &str = "pack the rehearsal's image";
        let failed = |error: io::Error| SandboxError::step(STEP, error);
        let (agent, folder) = (self.agent.clone(), self.folder.clone());
        let root = folder.join("root");
        let filled = root.clone();
        let fill = move || {
            // What a former server has left.
            removed(fs::remove_dir_all(&folder))?;
            fs::create_dir_all(&filled).map_err(failed)?;
            fs::copy(&agent, filled.join("agent")).map(drop).map_err(failed)
        };
        blocking(STEP, fill).await?;
        let layer = self.folder.join(LAYER_FILE);
        let packed = a3s_box_image::pack(&root, &layer).await;
        packed.map_err(|why| SandboxError::step(STEP, why))?;
        blocking(STEP, move || removed(fs::remove_dir_all(&root))).await?;
        Ok(layer)
    }
}

/// The program, and what it does besides its line.
fn program(then: Option<&str>) -> Vec<String> {
    PROGRAM.into_iter().chain(then).map(str::to_owned).collect()
}

/// Types on a terminal, and waits for each key to show.
async fn type_keys(shim: &ShimClient, container: &str, lane: Lane) -> Result<(), SandboxError> {
    const STEP: &str = "rehearse a terminal";
    let failed = |error: io::Error| SandboxError::step(STEP, error);
    let mark: Mark = rand::random();
    let start = agent::ExecStart {
        container_id: container.to_owned(),
        args: program(Some("listen")),
        tty: true,
        stdin: true,
        outlives_call: false,
        lane: Some(agent::Lane { number: lane.number, mark: mark.to_vec().into() }),
    };
    let input = agent::ExecInput { kind: Some(exec_input::Kind::Start(start)) };
    let inputs = tokio_stream::iter([input]).chain(tokio_stream::pending());
    let mut call = shim.exec(inputs).await?;
    let typed = async {
        let (from, to) = tokio::io::split(Duplex::new(lane.stream)?);
        let mut keys = Writer::begin(to, &mark).await?;
        let mut screen = Reader::begin(from, &mark).await?;
        // What comes first is the program's line, and the last key ends it.
        for key in [b"k"; KEYS].into_iter().chain([b"\n"]) {
            screen.next().await?;
            keys.send(Kind::Main, key).await?;
        }
        while !matches!(screen.next().await?, None | Some((Kind::End, _))) {}
        Ok(())
    };
    let ended = async {
        while let Some(output) = call.message().await.map_err(io::Error::other)? {
            match output.kind {
                Some(exec_output::Kind::Exit(exit)) if exit.code == 0 => return Ok(()),
                Some(exec_output::Kind::Exit(exit)) => {
                    return Err(io::Error::other(format!("exit code {}", exit.code)));
                }
                _ => {}
            }
        }
        Err(io::Error::other("the program's end was not told"))
    };
    let both = tokio::time::timeout(EXEC_TIMEOUT, async { tokio::try_join!(typed, ended) }).await;
    both.unwrap_or_else(|late| Err(late.into())).map(drop).map_err(failed)
}

/// Addresses of documentation (RFC 5737), which lead nowhere.
fn network() -> GuestNetwork {
    let interface = "eth0".to_owned();
    GuestNetwork {
        interfaces: vec![Interface {
            name: interface.clone(),
            mac: "02:00:00:00:00:02".to_owned(),
            mtu: 1500,
            addresses: vec!["192.0.2.2/24".to_owned()],
        }],
        routes: vec![Route {
            destination: "0.0.0.0/0".to_owned(),
            gateway: Some("192.0.2.1".to_owned()),
            interface: interface.clone(),
            source: None,
            mtu: None,
            scope: 0,
            onlink: false,
        }],
        neighbours: vec![Neighbour {
            address: "192.0.2.1".to_owned(),
            mac: "02:00:00:00:00:01".to_owned(),
            interface,
        }],
    }
}

/// As kubelet would ask for it: a volume, a filter, a log.
fn container(folder: &Path) -> cri::ContainerConfig {
    use cri::security_profile::ProfileType;
    let seccomp = cri::SecurityProfile {
        profile_type: ProfileType::RuntimeDefault.into(),
        ..Default::default()
    };
    let security = cri::LinuxContainerSecurityContext {
        seccomp: Some(seccomp),
        namespace_options: Some(cri::NamespaceOption {
            pid: cri::NamespaceMode::Container.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: "rehearsal".to_owned(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: "rehearsal".to_owned(), ..Default::default() }),
        command: program(None),
        args: vec!["stay".to_owned()],
        mounts: vec![cri::Mount {
            container_path: "/volume".to_owned(),
            host_path: folder.join("volume").display().to_string(),
            ..Default::default()
        }],
        log_path: "log".to_owned(),
        linux: Some(cri::LinuxContainerConfig {
            security_context: Some(security),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn image(layer: PathBuf) -> ContainerImage {
    ContainerImage {
        id: "rehearsal".to_owned(),
        tags: Vec::new(),
        digests: Vec::new(),
        config: ImageConfiguration::default(),
        layers: vec![layer],
    }
}

fn removed(result: io::Result<()>) -> Result<(), SandboxError> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(SandboxError::step("remove the rehearsal's files", error))
        }
        _ => Ok(()),
    }
}
