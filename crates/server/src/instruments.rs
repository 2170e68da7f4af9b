//! What the server counts of itself, for Prometheus. docs/metrics.md lists it.
//!
//! Counters are raised where things happen; what is only looked up (sandboxes, spare guests, teardowns
//! that are retried) is read when somebody asks.

use crate::{images::ImageStore, sandbox::Sandboxes, status::chain};
use a3s_box_types::sandbox::SandboxState;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::Registry,
};
use std::{borrow::Cow, collections::BTreeMap, sync::atomic::Ordering, time::Duration};
use tonic::Code;

/// Before every name.
const PREFIX: &str = "a3s_box";
/// Seconds, for what takes milliseconds.
const QUICK: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];
/// Seconds, for what takes seconds.
const SLOW: [f64; 10] = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Makes the histograms of a family.
#[derive(Debug, Clone, Copy)]
struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rpc {
    rpc: &'static str,
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stage {
    stage: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: Cow<'static, str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Boundary {
    boundary: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

impl Outcome {
    fn of<T, E>(result: &Result<T, E>) -> Self {
        Self { outcome: if result.is_ok() { "ok" } else { "failed" } }
    }
}

/// The server's counters.
#[derive(Debug)]
pub struct Instruments {
    registry: Registry,
    rpcs: Family<Rpc, Histogram, Buckets>,
    stages: Family<Stage, Histogram, Buckets>,
    starts: Family<Outcome, Counter>,
    boundary_deaths: Family<Boundary, Counter>,
    template_builds: Family<Outcome, Histogram, Buckets>,
    pulls: Family<Outcome, Histogram, Buckets>,
    pulled_bytes: Counter,
    sandboxes: Family<State, Gauge>,
    containers: Gauge,
    spares: Gauge,
    teardowns_retried: Gauge,
    listeners: Gauge,
}

impl Default for Instruments {
    fn default() -> Self {
        Self::new()
    }
}

impl Instruments {
    /// All at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let histograms = |buckets| Family::new_with_constructor(Buckets(buckets));
        let this = Self {
            rpcs: Family::new_with_constructor(Buckets(&QUICK)),
            stages: Family::new_with_constructor(Buckets(&QUICK)),
            starts: Family::default(),
            boundary_deaths: Family::default(),
            template_builds: histograms(&SLOW),
            pulls: histograms(&SLOW),
            pulled_bytes: Counter::default(),
            sandboxes: Family::default(),
            containers: Gauge::default(),
            spares: Gauge::default(),
            teardowns_retried: Gauge::default(),
            listeners: Gauge::default(),
            registry: Registry::default(),
        };
        registry.register(
            "rpc_seconds",
            "CRI calls by name and gRPC code, and how long they took",
            this.rpcs.clone(),
        );
        registry.register(
            "sandbox_start_stage_seconds",
            "From the begin of a sandbox's start to the end of each of its stages",
            this.stages.clone(),
        );
        registry.register(
            "sandbox_starts",
            "Sandboxes that were to be started, by how that ended",
            this.starts.clone(),
        );
        registry.register(
            "boundary_deaths",
            "Machines, and processes in their place, that ended though nobody asked for it",
            this.boundary_deaths.clone(),
        );
        registry.register(
            "template_build_seconds",
            "Templates of virtual machines that were built or found, and how long that took",
            this.template_builds.clone(),
        );
        registry.register(
            "image_pull_seconds",
            "Pulls of images, by how they ended, and how long they took",
            this.pulls.clone(),
        );
        registry.register(
            "image_pulled_bytes",
            "Bytes of layers that were fetched from registries",
            this.pulled_bytes.clone(),
        );
        registry.register("sandboxes", "Sandboxes by state", this.sandboxes.clone());
        registry.register("containers_running", "Containers that run", this.containers.clone());
        registry.register(
            "spare_guests",
            "Guests that wait, ready, for their pods",
            this.spares.clone(),
        );
        registry.register(
            "teardowns_retried",
            "Sandboxes of which something could not be taken away yet",
            this.teardowns_retried.clone(),
        );
        registry.register(
            "event_listeners",
            "Clients of GetContainerEvents",
            this.listeners.clone(),
        );
        Self { registry, ..this }
    }

    /// A CRI call has been answered.
    pub fn answered(&self, rpc: &'static str, code: Code, took: Duration) {
        let code = format!("{code:?}");
        self.rpcs.get_or_create(&Rpc { rpc, code }).observe(took.as_secs_f64());
    }

    /// A sandbox's creation has ended.
    pub fn started<E>(&self, result: &Result<(), E>, stages_ms: &BTreeMap<String, f64>) {
        self.starts.get_or_create(&Outcome::of(result)).inc();
        for (stage, ms) in stages_ms {
            let stage = Stage { stage: stage.clone() };
            self.stages.get_or_create(&stage).observe(ms / 1000.0);
        }
    }

    /// A boundary has ended by itself.
    pub fn boundary_died(&self, boundary: crate::sandbox::spec::Boundary) {
        let boundary = Boundary { boundary: boundary.to_string() };
        self.boundary_deaths.get_or_create(&boundary).inc();
    }

    /// A template was to be made.
    pub fn template_built<T, E>(&self, result: &Result<T, E>, took: Duration) {
        let outcome = Outcome::of(result);
        self.template_builds.get_or_create(&outcome).observe(took.as_secs_f64());
    }

    /// An image was to be pulled.
    pub fn pulled<T, E>(&self, result: &Result<T, E>, took: Duration) {
        self.pulls.get_or_create(&Outcome::of(result)).observe(took.as_secs_f64());
    }

    /// Everything in Prometheus' text format, with what is looked up as of now.
    pub fn text(&self, sandboxes: &Sandboxes, images: &dyn ImageStore) -> String {
        self.look_up(sandboxes, images);
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &self.registry) {
            // A string takes everything; a metric that cannot be written is a mistake of ours.
            tracing::error!("cannot write the metrics: {}", chain(&error));
        }
        text
    }

    fn look_up(&self, sandboxes: &Sandboxes, images: &dyn ImageStore) {
        let all = sandboxes.all();
        let count = |wanted: &dyn Fn(&crate::sandbox::View) -> bool| {
            i64::try_from(all.iter().filter(|(_, view)| wanted(view)).count()).unwrap_or(i64::MAX)
        };
        for (name, state) in [
            ("creating", SandboxState::Creating),
            ("ready", SandboxState::Ready),
            ("stopping", SandboxState::Stopping),
            ("not_ready", SandboxState::NotReady),
        ] {
            let of_state = count(&|view| view.record.state == state && view.unclear.is_none());
            self.sandboxes.get_or_create(&State { state: name.into() }).set(of_state);
        }
        let unclear = count(&|view| view.unclear.is_some());
        self.sandboxes.get_or_create(&State { state: "unclear".into() }).set(unclear);
        self.teardowns_retried.set(count(&|view| view.stuck));
        let running = all.iter().flat_map(|(_, view)| view.containers.values());
        let running = running.filter(|container| container.is_running()).count();
        self.containers.set(i64::try_from(running).unwrap_or(i64::MAX));
        let waiting = sandboxes.deps().spares.waiting();
        self.spares.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        let listeners = sandboxes.deps().events.listeners();
        self.listeners.set(i64::try_from(listeners).unwrap_or(i64::MAX));
        self.pulled_bytes.inner().store(images.fetched_bytes(), Ordering::Relaxed);
    }
}
