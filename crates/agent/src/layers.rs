//! Image layers: each is mounted once, however many containers stand on it.

use crate::{
    config::Config,
    error::{Error, Step},
};
use a3s_box_sys::loop_device::LoopDevice;
use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
};
use std::{
    collections::HashMap,
    fs, io,
    path::{Component, Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// The mounted layers. All calls block.
#[derive(Debug)]
pub struct Layers {
    share: PathBuf,
    folder: PathBuf,
    mounted: Mutex<HashMap<String, usize>>,
}

impl Layers {
    /// None yet.
    pub fn new(config: &Config) -> Self {
        Self { share: config.share.clone(), folder: config.layers(), mounted: Mutex::default() }
    }

    /// Mounts a layer, or counts one more user of it. Returns where.
    pub fn acquire(&self, name: &str) -> Result<PathBuf, Error> {
        let plain = !name.is_empty()
            && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
        if !plain {
            return Err(Error::invalid(format!("layer {name:?} is not a path under the share")));
        }
        let target = self.target(name);
        // Held while mounting, so that nobody uses a layer that is not there yet.
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        match mounted.get_mut(name) {
            Some(users) => *users += 1,
            None => {
                let what = format!("layer {name}");
                fs::create_dir_all(&target).step(&what)?;
                attach(&self.share.join(name), &target).step(&what)?;
                mounted.insert(name.to_owned(), 1);
            }
        }
        Ok(target)
    }

    /// One user less; the last one unmounts it.
    pub fn release(&self, name: &str) -> Result<(), Error> {
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        match mounted.get_mut(name) {
            None => Ok(()),
            Some(users) if *users > 1 => {
                *users -= 1;
                Ok(())
            }
            Some(_) => {
                mounted.remove(name);
                let target = self.target(name);
                // Detached: overlay may let go of it a moment after the last process is gone.
                unmount(&target, UnmountFlags::DETACH)
                    .step(format_args!("unmount layer {name}"))?;
                fs::remove_dir(&target).step(format_args!("unmount layer {name}"))
            }
        }
    }

    fn target(&self, name: &str) -> PathBuf {
        self.folder.join(name.replace('/', "-"))
    }
}

/// Mounts the file itself, or, with kernels before 6.12, a loop device of it.
fn attach(blob: &Path, target: &Path) -> io::Result<()> {
    let mount = |source: &Path| mount(source, target, "erofs", MountFlags::RDONLY, None);
    match mount(blob) {
        Err(Errno::NOTBLK) => {
            let device = LoopDevice::attach(&fs::File::open(blob)?)?;
            Ok(mount(device.path())?)
        }
        result => Ok(result?),
    }
}
