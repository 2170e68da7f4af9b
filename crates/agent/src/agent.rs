//! Everything the agent has: its folders, its launcher, its containers.

use crate::{
    config::{Boundary, Config},
    container::Container,
    device_rules::DeviceRules,
    error::{Error, Step},
    events::Events,
    huge_pages::HugePages,
    lanes::Lanes,
    launcher::{Descriptors, Launcher},
    layers::Layers,
    plan::Plan,
    reaper::Reaper,
    sandbox::Sandbox,
    seccomp_filter::Filters,
    spawn::{self, Spawned, Starting},
    user_namespace::UserNamespace,
    volume_mounts::VolumeMounts,
    watcher::Watcher,
};
use rustix::fd::OwnedFd;
use std::{
    collections::HashMap,
    fs,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

/// The agent's state. One for the process's life.
#[derive(Debug)]
pub struct Agent {
    /// Where things are.
    pub config: Config,
    /// The node's mount namespace, where the agent is a process of the node.
    pub node_mounts: Option<OwnedFd>,
    /// Makes processes.
    pub launcher: Launcher,
    /// Waits for them.
    pub reaper: Reaper,
    /// Watches cgroups.
    pub watcher: Watcher,
    /// Tells what happened.
    pub events: Events,
    /// For execs' bytes; a process of the node has none.
    pub lanes: Lanes,
    /// Mounted image layers.
    pub layers: Layers,
    /// Those of a guest.
    pub huge_pages: HugePages,
    /// What containers mount in their volumes.
    pub volume_mounts: VolumeMounts,
    /// Compiled seccomp profiles.
    pub filters: Filters,
    /// Loaded device rules.
    pub device_rules: DeviceRules,
    /// Set by ConfigureSandbox.
    pub sandbox: OnceLock<Sandbox>,
    /// Set by a rehearsal of it.
    pub rehearsal: OnceLock<Sandbox>,
    /// ConfigureSandbox has begun.
    pub configuring: Mutex<bool>,
    containers: Mutex<HashMap<String, Slot>>,
}

#[derive(Debug)]
enum Slot {
    /// Being created or removed.
    Busy,
    There(Arc<Container>),
}

impl Agent {
    /// Makes the folders and starts the tasks that never end. Needs a runtime.
    pub fn start(
        config: Config,
        launcher: OwnedFd,
        node_mounts: Option<OwnedFd>,
    ) -> Result<Arc<Self>, Error> {
        for folder in [config.layers(), config.staging(), config.scratch.clone()] {
            fs::create_dir_all(&folder).step(format_args!("make {}", folder.display()))?;
        }
        crate::cgroup::delegate(&config.cgroups)?;
        let agent = Arc::new(Self {
            node_mounts,
            launcher: Launcher::new(launcher).step("launcher")?,
            reaper: Reaper::default(),
            watcher: Watcher::new().step("inotify")?,
            events: Events::default(),
            lanes: match config.boundary {
                Boundary::Guest => Lanes::open()?,
                Boundary::Host => Lanes::none(),
            },
            layers: Layers::new(&config),
            huge_pages: HugePages::default(),
            volume_mounts: VolumeMounts::new(&config),
            filters: Filters::default(),
            device_rules: DeviceRules::default(),
            sandbox: OnceLock::new(),
            rehearsal: OnceLock::new(),
            configuring: Mutex::new(false),
            containers: Mutex::default(),
            config,
        });
        let reaping = Arc::clone(&agent);
        let watching = Arc::clone(&agent);
        if agent.config.boundary == Boundary::Guest {
            let following = Arc::clone(&agent);
            tokio::spawn(async move {
                if let Err(error) = following.volume_mounts.run().await {
                    crate::log::error(format_args!("table of mounts: {error}"));
                }
            });
        }
        tokio::spawn(async move {
            if let Err(error) = reaping.reaper.run().await {
                crate::log::error(format_args!("reaper: {error}"));
            }
        });
        tokio::spawn(async move {
            if let Err(error) = watching.watcher.run().await {
                crate::log::error(format_args!("inotify: {error}"));
            }
        });
        Ok(agent)
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container of that id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match self.table().get(id) {
            Some(Slot::There(container)) => Ok(Arc::clone(container)),
            Some(Slot::Busy) => {
                Err(Error::NotNow(format!("container {id} is being created or removed")))
            }
            None => Err(Error::NoContainer(id.to_owned())),
        }
    }

    /// Takes an id for a container that is about to be created.
    pub fn reserve(&self, id: &str) -> Result<(), Error> {
        let mut table = self.table();
        if table.contains_key(id) {
            return Err(Error::Exists(id.to_owned()));
        }
        table.insert(id.to_owned(), Slot::Busy);
        Ok(())
    }

    /// Puts a container, or nothing, in the place that was taken.
    pub fn settle(&self, id: &str, container: Option<Arc<Container>>) {
        let mut table = self.table();
        match container {
            Some(container) => drop(table.insert(id.to_owned(), Slot::There(container))),
            None => drop(table.remove(id)),
        }
    }

    /// Takes a container out, to remove it. None: there is none.
    pub fn take(&self, id: &str) -> Result<Option<Arc<Container>>, Error> {
        let container = match self.container(id) {
            Err(Error::NoContainer(_)) => return Ok(None),
            other => other?,
        };
        self.table().insert(id.to_owned(), Slot::Busy);
        Ok(Some(container))
    }

    /// The ids of all containers.
    pub fn ids(&self) -> Vec<String> {
        self.table().keys().cloned().collect()
    }

    /// Makes a process.
    pub async fn spawn(
        &self,
        plan: &Plan,
        namespaces: u64,
        descriptors: Descriptors,
    ) -> Result<Spawned, Error> {
        self.start_process(plan, namespaces, descriptors).await?.ready().await
    }

    /// Makes a process that does not get ready without further help.
    pub async fn start_process(
        &self,
        plan: &Plan,
        namespaces: u64,
        descriptors: Descriptors,
    ) -> Result<Starting<'_>, Error> {
        spawn::start(&self.launcher, &self.reaper, plan, namespaces, descriptors).await
    }

    /// What the containers belong to; none: it is not configured.
    pub fn sandbox(&self) -> Option<&Sandbox> {
        self.sandbox.get().or_else(|| self.rehearsal.get())
    }

    /// The pod's user namespace; none: it is the guest's.
    pub fn user_namespace(&self) -> Option<&UserNamespace> {
        self.sandbox()?.user_namespace.as_ref()
    }
}

/// Runs blocking work beside the runtime's thread.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other).step("blocking work")?
}
