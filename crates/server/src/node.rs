//! What the RPCs of sandboxes and containers share.

use crate::{
    config::{Config, Handler},
    container_stats::Rates,
    instruments::Instruments,
    sandbox::{
        Deps, Events, SandboxError, Sandboxes,
        cni_network::CniNetwork,
        network::Network,
        rehearsal::Rehearsal,
        shim_process::{Places, ShimProcesses, Templates},
        shims::Shims,
        spares::{Outside, Spares},
    },
    vm_size::SizeRules,
};
use a3s_box_net::Cni;
use a3s_box_store::Store;
use oci_spec::image::ImageConfiguration;
use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

/// Folder of sandboxes under the root and under the state folder.
const SANDBOXES: &str = "sandboxes";
/// Folder under the root of what spare guests rehearse with.
const REHEARSALS: &str = "rehearsals";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// File under the state folder of the events that were told.
const EVENTS: &str = "events";

/// Sandboxes, images and the configuration's rules for them.
pub struct Node {
    /// All sandboxes.
    pub sandboxes: Sandboxes,
    /// For CreateContainer.
    pub images: Box<dyn Images>,
    /// Sizes of virtual machines.
    pub sizes: SizeRules,
    /// The runtime handlers by name.
    pub handlers: BTreeMap<String, Handler>,
    /// The folder that holds what pods write.
    pub root: PathBuf,
    /// CPU rates of containers and sandboxes.
    pub rates: Rates,
}

/// The image store, as far as containers need it.
pub trait Images: Send + Sync {
    /// The image with this name, digest or id; `None` when it was not pulled.
    fn resolve(&self, name: &str) -> Option<ContainerImage>;
}

/// An image that a container is made of.
#[derive(Debug, Clone)]
pub struct ContainerImage {
    /// Digest of its config.
    pub id: String,
    /// `name:tag`, may be none.
    pub tags: Vec<String>,
    /// `name@digest`, may be none.
    pub digests: Vec<String>,
    /// Entry point, environment, user and the like.
    pub config: ImageConfiguration,
    /// EROFS blobs, lowest first.
    pub layers: Vec<PathBuf>,
}

impl Node {
    /// The node of this configuration. Call inside a runtime, then `sandboxes.recover()` before any
    /// RPC is answered.
    pub fn open(
        config: &Config,
        cni: Arc<Cni>,
        templates: Arc<dyn Templates>,
        images: Box<dyn Images>,
        instruments: Arc<Instruments>,
    ) -> Result<Self, SandboxError> {
        let places = Places {
            shim: config.shim.clone(),
            agent: config.agent.clone(),
            qemu: config.vm.qemu.clone(),
            state: config.state.join(SANDBOXES),
            root: config.root.join(SANDBOXES),
            uid_base: config.vm.uid_base,
            uid_count: config.vm.uid_count,
            most_memory_mb: config.vm.max_size.memory_mb,
            max_vcpus: config.vm.max_size.vcpus,
            start_timeout: config.vm.start_timeout,
        };
        let boot_id = std::fs::read_to_string(BOOT_ID)
            .map_err(|error| SandboxError::step("read the boot id", error))?;
        let events = Events::open(config.state.join(EVENTS))
            .map_err(|error| SandboxError::step("open the journal of events", error))?;
        let store = Store::open(&places.root)?;
        let network: Arc<dyn Network> = Arc::new(CniNetwork::new(cni));
        let shims: Arc<dyn Shims> = Arc::new(ShimProcesses::new(places, templates)?);
        let outside = Outside {
            store: store.clone(),
            network: network.clone(),
            shims: shims.clone(),
            rehearsal: Rehearsal::new(&config.agent, &config.root.join(REHEARSALS)),
        };
        let deps = Deps {
            store,
            network,
            shims,
            spares: Spares::new(config.vm.spares, config.vm.default_size, outside),
            boot_id: boot_id.trim().to_owned(),
            instruments,
            events: Arc::new(events),
        };
        let sizes = SizeRules {
            default: config.vm.default_size,
            min_memory_mb: config.vm.min_memory_mb,
            max: config.vm.max_size,
            guest_overhead_mb: config.vm.guest_overhead_mb,
        };
        Ok(Self {
            sandboxes: Sandboxes::new(deps),
            images,
            sizes,
            handlers: config.handlers.clone(),
            root: config.root.clone(),
            rates: Rates::default(),
        })
    }

    /// The handler of this name; refuses one that is not configured.
    pub fn handler(&self, name: &str) -> Result<&Handler, SandboxError> {
        if let Some(handler) = self.handlers.get(name) {
            return Ok(handler);
        }
        let known: Vec<_> = self.handlers.keys().map(|name| format!("{name:?}")).collect();
        let why = format!("{name:?} is not configured; there are {}", known.join(", "));
        Err(SandboxError::invalid("runtime_handler", why))
    }
}
