//! Device rules as the kernel has them, loaded once: the containers of a pod mostly have the same, and
//! the kernel's check of a program takes longer than all else about a cgroup.

use crate::error::{Error, Step};
use a3s_box_sys::device_filter::{self, Rule};
use rustix::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

/// More different rules than a pod has containers are nobody's need.
const KEPT: usize = 16;

/// Loaded programs with what they enforce.
#[derive(Debug, Default)]
pub struct DeviceRules(Mutex<Vec<(Vec<Rule>, Arc<OwnedFd>)>>);

impl DeviceRules {
    /// The program for these rules, loaded now unless it was before.
    pub fn get(&self, rules: &[Rule]) -> Result<Arc<OwnedFd>, Error> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, program)) = all.iter().find(|(known, _)| known == rules) {
            return Ok(Arc::clone(program));
        }
        let program = Arc::new(device_filter::load(rules).step("device rules")?);
        if all.len() >= KEPT {
            all.clear();
        }
        all.push((rules.to_vec(), Arc::clone(&program)));
        Ok(program)
    }
}
