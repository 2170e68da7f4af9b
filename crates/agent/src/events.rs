//! What happened by itself, kept from boot on: a caller that comes late misses nothing.

use a3s_box_api::agent::v1::{Event, event::Kind};
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};
use tokio::sync::watch;

/// The events by number. Those of a removed container are forgotten, which bounds them.
#[derive(Debug)]
pub struct Events {
    all: Mutex<BTreeMap<u64, Event>>,
    last: watch::Sender<u64>,
}

impl Default for Events {
    fn default() -> Self {
        Self { all: Mutex::default(), last: watch::Sender::new(0) }
    }
}

impl Events {
    /// Adds one.
    pub fn publish(&self, kind: Kind) {
        self.last.send_modify(|last| {
            *last += 1;
            let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
            all.insert(*last, Event { kind: Some(kind) });
        });
    }

    /// Forgets those of a container.
    pub fn forget(&self, container: &str) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, event| {
            match &event.kind {
                Some(Kind::ContainerExited(event)) => event.container_id != container,
                Some(Kind::ContainerOom(event)) => event.container_id != container,
                None => false,
            }
        });
    }

    /// All after number `seen`, and the number to ask with next.
    pub fn after(&self, seen: u64) -> (Vec<Event>, u64) {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let new: Vec<_> = all.range(seen + 1..).collect();
        let last = new.last().map_or(seen, |(number, _)| **number);
        (new.into_iter().map(|(_, event)| event.clone()).collect(), last)
    }

    /// Changes with every event.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }
}
