//! The driver against a fake host: crashes, failures, retries and recovery.

use super::{
    Deps, NewContainer, Sandbox, SandboxError, Sandboxes, View,
    fakes::{Census, FakeHost},
    record::{Record, SANDBOX},
    spec::{HostLimits, NodeNamespaces, SandboxName, SandboxSpec},
};
use crate::{
    container::{ContainerRecord, ContainerSpec, Phase, record},
    status::chain,
};
use a3s_box_api::{agent::v1 as agent, shim::v1 as shim};
use a3s_box_types::{ContainerId, SandboxId, sandbox::SandboxState, shim::VmSize};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{
    runtime::{self, Runtime},
    time::timeout,
};
use tonic::Status;

const NOTHING: Census = (0, 0, 0, 0);
const ONE_POD: Census = (1, 1, 1, 1);
/// For what should happen at once.
const SOON: Duration = Duration::from_secs(10);

pub(crate) fn spec(name: &str) -> SandboxSpec {
    SandboxSpec {
        name: SandboxName {
            namespace: "default".into(),
            name: name.into(),
            uid: "u".into(),
            attempt: 0,
        },
        runtime_handler: String::new(),
        node_namespaces: NodeNamespaces::default(),
        hostname: String::new(),
        log_directory: "/var/log/pods/a".into(),
        dns: None,
        port_mappings: Vec::new(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        cgroup_parent: String::new(),
        sysctls: BTreeMap::new(),
        shared_pid: true,
        user_namespace: None,
        privileged: false,
        network: None,
        host_limits: HostLimits::default(),
        size: VmSize { vcpus: 1, memory_mb: 512 },
    }
}

/// The view of a ready sandbox with these labels.
pub(crate) fn view<const N: usize>(name: &str, labels: [(&str, &str); N]) -> View {
    let mut spec = spec(name);
    spec.labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    View {
        record: Record {
            id: SandboxId::from_random([0xab; 32]),
            spec,
            state: SandboxState::Ready,
            created_at: 1,
            boot_id: String::new(),
            network: None,
            boundary: None,
            end_reason: None,
            resized: None,
        },
        containers: BTreeMap::new(),
        unclear: None,
        created: Some(Ok(())),
        settled: true,
        stuck: false,
        removed: false,
    }
}

/// A server with a runtime of its own, so that it can be killed: its drivers then stop wherever they
/// are, and the host and its shims go on.
struct Server {
    sandboxes: Sandboxes,
    runtime: Option<Runtime>,
}

impl Server {
    fn new(deps: Deps) -> Self {
        let runtime =
            runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { sandboxes: Sandboxes::new(deps), runtime: Some(runtime) }
    }

    fn run(&self, spec: SandboxSpec) -> Result<Sandbox, SandboxError> {
        let _inside = self.runtime.as_ref().unwrap().enter();
        self.sandboxes.run(spec)
    }

    async fn recover(self) -> Self {
        let sandboxes = self.sandboxes.clone();
        let work = async move { sandboxes.recover().await };
        self.runtime.as_ref().unwrap().spawn(work).await.unwrap().unwrap();
        self
    }

    fn all(&self) -> Vec<(Sandbox, Arc<View>)> {
        self.sandboxes.all()
    }

    fn saved(&self) -> BTreeMap<String, a3s_box_store::Object> {
        self.sandboxes.deps().store.scan().unwrap()
    }

    fn only(&self) -> Sandbox {
        let all = self.all();
        assert_eq!(all.len(), 1);
        all[0].0.clone()
    }

    /// Waits for drivers that end by themselves, as after a failed creation.
    async fn none_left(&self) {
        let emptied = async {
            while !self.all().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, emptied).await.unwrap();
    }
}

/// Killed.
impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn server(host: &Arc<FakeHost>) -> Server {
    Server::new(host.deps())
}

async fn recovered(host: &Arc<FakeHost>) -> Server {
    server(host).recover().await
}

async fn ready_pod(host: &Arc<FakeHost>) -> (Server, Sandbox, SandboxId) {
    let server = server(host);
    let sandbox = server.run(spec("a")).unwrap();
    let id = sandbox.created().await.unwrap();
    (server, sandbox, id)
}

fn container(sandbox: &SandboxId, name: &str) -> NewContainer {
    let mut record = record::tests::record(Phase::Creating);
    record.id = ContainerId::from_random(rand::random());
    record.sandbox_id = sandbox.clone();
    record.spec = ContainerSpec { name: name.into(), ..ContainerSpec::default() };
    let order = shim::CreateContainerRequest {
        container: Some(agent::CreateContainerRequest {
            container_id: record.id.to_string(),
            ..Default::default()
        }),
        ..Default::default()
    };
    NewContainer { record, order }
}

async fn running(sandbox: &Sandbox, id: &SandboxId, name: &str) -> ContainerId {
    let container = sandbox.create_container(container(id, name)).await.unwrap();
    sandbox.start_container(&container).await.unwrap();
    container
}

async fn exited(sandbox: &Sandbox, id: &ContainerId) -> record::Exit {
    let ended = sandbox.wait_for(|view| view.containers[id].exit().is_some());
    let view = timeout(SOON, ended).await.unwrap().unwrap();
    view.containers[id].exit().unwrap().clone()
}

/// Killing the server at any point of RunPodSandbox leaves nothing behind, or a whole pod, once the
/// next one has recovered.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_step_of_the_creation_leaks_nothing() {
    let mut whole = 0;
    for step in 0..=10 {
        let host = FakeHost::new();
        host.die_after(step);
        let dead = server(&host);
        let sandbox = dead.run(spec("a")).unwrap();
        let answered = timeout(Duration::from_millis(300), sandbox.created()).await.is_ok();
        drop(dead);
        host.revive();
        let next = recovered(&host).await;
        if answered {
            whole += 1;
            assert_eq!(host.census(), ONE_POD, "after {step} points");
            assert!(next.only().view().ready());
        } else {
            next.none_left().await;
            assert_eq!(host.census(), NOTHING, "after {step} points");
            assert!(next.saved().is_empty(), "after {step} points");
        }
    }
    assert!((1..=10).contains(&whole), "the loop reaches neither too far nor far enough: {whole}");
}

/// The same for StopPodSandbox and RemovePodSandbox.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_step_of_the_end_is_finished_by_the_next_server() {
    for step in 0..=5 {
        let host = FakeHost::new();
        let (dead, sandbox, id) = ready_pod(&host).await;
        running(&sandbox, &id, "c").await;
        host.die_after(step);
        let removed = timeout(Duration::from_millis(300), sandbox.remove()).await.is_ok();
        drop(dead);
        host.revive();
        let next = recovered(&host).await;
        for (sandbox, _) in next.all() {
            timeout(SOON, sandbox.remove()).await.unwrap().unwrap();
        }
        assert_eq!(host.census(), NOTHING, "after {step} points (removed: {removed})");
        assert!(next.saved().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_at_any_step_leaves_nothing_and_frees_the_name() {
    for step in ["prepare", "prepared", "attach", "attached", "start", "started", "join"] {
        let host = FakeHost::new();
        let sandboxes = server(&host);
        host.fail(step, 1);
        let error = sandboxes.run(spec("a")).unwrap().created().await.unwrap_err();
        assert!(chain(&*error).contains(step), "{error}");
        sandboxes.none_left().await;
        assert_eq!(host.census(), NOTHING, "{step}");
        sandboxes.run(spec("a")).unwrap().created().await.unwrap();
        assert_eq!(host.census(), ONE_POD, "{step}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ended_the_guest_is_told_and_not_what_came_of_it() {
    let host = FakeHost::new();
    let sandboxes = server(&host);
    host.guest_ends("QEMU closed its control socket");
    host.fail("join", 1);
    let error = sandboxes.run(spec("a")).unwrap().created().await.unwrap_err();
    assert!(chain(&*error).contains("QEMU closed"), "{}", chain(&*error));
    sandboxes.none_left().await;
    assert_eq!(host.census(), NOTHING);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_does_not_come_to_life_is_replaced_by_another_guest_once() {
    let host = FakeHost::new();
    let sandboxes = server(&host);
    host.clone_fails();
    host.fail("join", 1);
    let sandbox = sandboxes.run(spec("a")).unwrap();
    sandbox.created().await.unwrap();
    assert_eq!(host.census(), ONE_POD);
    sandbox.remove().await.unwrap();
    host.clone_fails();
    host.fail("join", 2);
    sandboxes.run(spec("a")).unwrap().created().await.unwrap_err();
    sandboxes.none_left().await;
    assert_eq!(host.census(), NOTHING);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_joins_what_its_impatient_caller_began() {
    let host = FakeHost::new();
    host.die_after(4);
    let sandboxes = server(&host);
    let first = sandboxes.run(spec("a")).unwrap();
    assert!(timeout(Duration::from_millis(50), first.created()).await.is_err());
    let id = first.view().record.id.clone();
    drop(first);
    let second = sandboxes.run(spec("a")).unwrap();
    assert_eq!(second.view().record.id, id);
    assert_eq!(sandboxes.all().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_again_gets_the_same_sandbox_and_another_one_its_id_in_the_error() {
    let host = FakeHost::new();
    let (sandboxes, _, id) = ready_pod(&host).await;
    assert_eq!(sandboxes.run(spec("a")).unwrap().created().await.unwrap(), id);
    let mut other = spec("a");
    other.hostname = "other".into();
    let error = sandboxes.run(other).err().unwrap().to_string();
    assert!(error.contains(id.as_str()), "{error}");
    assert_eq!(host.census(), ONE_POD);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_in_the_middle_of_the_creation_ends_it_and_leaves_nothing() {
    let host = FakeHost::new();
    let sandboxes = server(&host);
    let sandbox = {
        let sandbox = sandboxes.run(spec("a")).unwrap();
        let begun = async {
            while host.census().3 == 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, begun).await.unwrap();
        let id = sandbox.view().record.id.clone();
        host.shim(&id).stuck.lock().unwrap().insert("configure");
        sandbox
    };
    timeout(SOON, sandbox.remove()).await.unwrap().unwrap();
    assert_eq!(host.census(), NOTHING);
    assert!(sandboxes.all().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_goes_on_past_an_error_and_the_next_stop_finishes() {
    let host = FakeHost::new();
    let (_sandboxes, sandbox, _) = ready_pod(&host).await;
    host.fail("detach", 1);
    let error = sandbox.stop().await.unwrap_err();
    assert!(chain(&*error).contains("detach"), "{error}");
    assert_eq!(host.census(), (1, 1, 1, 0), "the boundary is gone though the network is not");
    assert_eq!(sandbox.view().record.state, SandboxState::Stopping);
    sandbox.stop().await.unwrap();
    assert_eq!(sandbox.view().record.state, SandboxState::NotReady);
    sandbox.stop().await.unwrap();
    assert_eq!(host.census(), (0, 0, 1, 0), "console and exit records stay until the removal");
    sandbox.remove().await.unwrap();
    sandbox.remove().await.unwrap();
    assert_eq!(host.census(), NOTHING);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boundary_that_ends_by_itself_ends_its_containers_and_says_why() {
    let host = FakeHost::new();
    let (_sandboxes, sandbox, id) = ready_pod(&host).await;
    let container = running(&sandbox, &id, "c").await;
    host.shim(&id).end_boundary("QEMU was killed");
    let exit = exited(&sandbox, &container).await;
    assert_eq!((exit.code, exit.message.as_str()), (137, "QEMU was killed"));
    let gone = sandbox.wait_for(|view| view.record.state == SandboxState::NotReady);
    let view = timeout(SOON, gone).await.unwrap().unwrap();
    assert_eq!(view.record.end_reason.as_deref(), Some("QEMU was killed"));
    assert_eq!(host.census(), (0, 0, 1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_shim_is_noticed_and_torn_down() {
    let host = FakeHost::new();
    let (_sandboxes, sandbox, id) = ready_pod(&host).await;
    running(&sandbox, &id, "c").await;
    host.kill_shim(&id);
    let gone = sandbox.wait_for(|view| view.record.state == SandboxState::NotReady);
    timeout(SOON, gone).await.unwrap().unwrap();
    assert_eq!(host.census(), (0, 0, 1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_finds_the_same_containers_and_the_exit_in_between() {
    let host = FakeHost::new();
    let (dead, sandbox, id) = ready_pod(&host).await;
    let runs = running(&sandbox, &id, "runs").await;
    let ends = running(&sandbox, &id, "ends").await;
    drop(dead);
    host.shim(&id)
        .containers
        .lock()
        .unwrap()
        .get_mut(ends.as_str())
        .unwrap()
        .set_phase(shim::container_state::Phase::Exited);
    host.shim(&id).containers.lock().unwrap().get_mut(ends.as_str()).unwrap().exit =
        Some(agent::Exit { code: 7, exited_at: 123, ..Default::default() });
    let next = recovered(&host).await;
    let view = next.only().view();
    assert!(view.ready() && view.settled);
    assert_eq!(view.record.id, id);
    assert_eq!(view.containers[&runs].phase, Phase::Running { started_at: 50 });
    let exit = view.containers[&ends].exit().unwrap();
    assert_eq!((exit.code, exit.finished_at, exit.reason.as_str()), (7, 123, "Error"));
    assert_eq!(host.census(), ONE_POD);
}

/// Gives the order, and returns when the shim has the container and keeps its answer to itself.
async fn made_without_an_answer(host: &FakeHost, sandbox: &Sandbox, new: NewContainer) {
    let (id, shim) = (new.record.id.to_string(), host.shim(&new.record.sandbox_id));
    shim.stuck.lock().unwrap().insert("created");
    let made = async {
        while !shim.containers.lock().unwrap().contains_key(&id) {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        _ = sandbox.create_container(new) => panic!("the shim has not answered"),
        () = made => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_at_the_shim_does_not_stand_for_the_answer_to_a_creation() {
    let host = FakeHost::new();
    let (_server, sandbox, id) = ready_pod(&host).await;
    let ends = running(&sandbox, &id, "ends").await;
    let new = container(&id, "c");
    let being_made = new.record.id.clone();
    made_without_an_answer(&host, &sandbox, new).await;
    // The driver hears of the exit from a look at everything.
    let shim = host.shim(&id);
    let mut state = shim.containers.lock().unwrap()[ends.as_str()].clone();
    state.set_phase(shim::container_state::Phase::Exited);
    state.exit = Some(agent::Exit { code: 7, exited_at: 123, ..Default::default() });
    shim.containers.lock().unwrap().insert(ends.to_string(), state);
    shim.break_events();
    assert_eq!(exited(&sandbox, &ends).await.code, 7);
    let early = timeout(SOON, sandbox.start_container(&being_made)).await.unwrap();
    assert!(early.unwrap_err().to_string().contains("being created"));
    assert_eq!(sandbox.view().containers[&being_made].phase, Phase::Creating);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_was_being_made_when_the_server_died_is_undone() {
    let host = FakeHost::new();
    let (dead, sandbox, id) = ready_pod(&host).await;
    made_without_an_answer(&host, &sandbox, container(&id, "c")).await;
    drop(dead);
    let next = recovered(&host).await;
    // Not before: the dead one must not get its answer after all.
    host.shim(&id).stuck.lock().unwrap().clear();
    assert!(next.only().view().containers.is_empty());
    assert!(host.shim(&id).containers.lock().unwrap().is_empty());
    running(&next.only(), &id, "c").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_another_boot_nothing_runs_and_the_exits_are_no_success() {
    let host = FakeHost::new();
    let (dead, sandbox, id) = ready_pod(&host).await;
    let container = running(&sandbox, &id, "c").await;
    drop(dead);
    host.kill_shim(&id);
    let mut deps = host.deps();
    deps.boot_id = "boot-2".into();
    let next = Server::new(deps).recover().await;
    let sandbox = next.only();
    assert_eq!(exited(&sandbox, &container).await.code, 137);
    let down = sandbox.wait_for(|view| view.record.state == SandboxState::NotReady);
    timeout(SOON, down).await.unwrap().unwrap();
    assert_eq!(host.census(), (0, 0, 1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn in_doubt_a_pod_is_kept_shown_as_not_ready_and_believed_again_later() {
    let host = FakeHost::new();
    let (dead, _, id) = ready_pod(&host).await;
    drop(dead);
    host.mute_shim(&id);
    host.doubt(true);
    let next = recovered(&host).await;
    let sandbox = next.only();
    assert!(!sandbox.view().ready());
    assert_eq!(host.census(), ONE_POD, "nothing is deleted on doubt");
    host.unmute_shim(&id);
    let again = sandbox.wait_for(|view| view.ready());
    timeout(SOON, again).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_record_is_torn_down_when_nothing_runs_and_kept_when_something_does() {
    for damage in [None, Some("{\"version\":1,\"record\":{\"id\":1}}"), Some("half")] {
        for alive in [false, true] {
            let host = FakeHost::new();
            let (dead, _, id) = ready_pod(&host).await;
            let folder = host.deps().store.folder(id.as_str()).unwrap();
            drop(dead);
            match damage {
                Some(text) => std::fs::write(folder.join("sandbox.json"), text).unwrap(),
                None => std::fs::remove_dir_all(folder).unwrap(),
            }
            if !alive {
                host.kill_shim(&id);
            }
            let next = recovered(&host).await;
            if alive {
                let sandbox = next.only();
                assert!(!sandbox.view().ready() && sandbox.view().listed());
                assert_eq!(host.census(), ONE_POD);
                sandbox.remove().await.unwrap();
            } else {
                next.none_left().await;
            }
            assert_eq!(host.census(), NOTHING, "{damage:?}, alive: {alive}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_without_anything_else_is_removed() {
    let host = FakeHost::new();
    host.add_netns(&SandboxId::from_random([3; 32]));
    recovered(&host).await.none_left().await;
    assert_eq!(host.census(), NOTHING);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_container_again_is_one_and_another_of_its_name_is_refused() {
    let host = FakeHost::new();
    let (_sandboxes, sandbox, id) = ready_pod(&host).await;
    let first = sandbox.create_container(container(&id, "c")).await.unwrap();
    let again = sandbox.create_container(container(&id, "c")).await.unwrap();
    assert_eq!(first, again);
    let mut other = container(&id, "c");
    other.record.spec.tty = true;
    let error = sandbox.create_container(other).await.unwrap_err().to_string();
    assert!(error.contains(first.as_str()), "{error}");
    assert_eq!(host.shim(&id).containers.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_cannot_be_made_leaves_no_name_behind() {
    let host = FakeHost::new();
    let (_sandboxes, sandbox, id) = ready_pod(&host).await;
    for point in ["create", "created"] {
        let refusal = Status::invalid_argument("no such user");
        host.shim(&id).refusals.lock().unwrap().insert(point, refusal);
        let error = sandbox.create_container(container(&id, "c")).await.unwrap_err();
        assert!(error.to_string().contains("no such user"), "{error}");
        assert!(sandbox.view().containers.is_empty(), "{point}");
        assert!(host.shim(&id).containers.lock().unwrap().is_empty(), "{point}");
    }
    sandbox.create_container(container(&id, "c")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_cannot_run_is_a_start_error_and_a_lost_answer_is_not() {
    let host = FakeHost::new();
    let (_sandboxes, sandbox, id) = ready_pod(&host).await;
    let container = sandbox.create_container(container(&id, "c")).await.unwrap();
    let refuse = |status| host.shim(&id).refusals.lock().unwrap().insert("start", status);
    refuse(Status::unavailable("try later"));
    sandbox.start_container(&container).await.unwrap_err();
    assert_eq!(sandbox.view().containers[&container].phase, Phase::Created);
    refuse(Status::not_found("fly: no such command"));
    sandbox.start_container(&container).await.unwrap_err();
    let exit = exited(&sandbox, &container).await;
    assert_eq!((exit.code, exit.reason.as_str()), (128, "StartError"));
    assert!(exit.message.contains("fly"), "{}", exit.message);
    sandbox.start_container(&container).await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_is_told_saved_and_survives_the_sandbox() {
    let host = FakeHost::new();
    let (sandboxes, sandbox, id) = ready_pod(&host).await;
    let container = running(&sandbox, &id, "c").await;
    host.shim(&id).exit(container.as_str(), 0);
    let exit = exited(&sandbox, &container).await;
    assert_eq!((exit.code, exit.reason.as_str(), exit.finished_at), (0, "Completed", 99));
    sandbox.stop().await.unwrap();
    let saved = sandboxes.saved();
    let file = ContainerRecord::file(&container);
    let record = saved[id.as_str()].get::<ContainerRecord>(&file).unwrap().unwrap();
    assert_eq!(record.exit(), Some(&exit));
    let record = saved[id.as_str()].get::<Record>(SANDBOX).unwrap().unwrap();
    assert_eq!(record.state, SandboxState::NotReady);
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_a_container_may_be_repeated_and_joined() {
    let host = FakeHost::new();
    let (_sandboxes, sandbox, id) = ready_pod(&host).await;
    let container = running(&sandbox, &id, "c").await;
    let (one, two) =
        tokio::join!(sandbox.remove_container(&container), sandbox.remove_container(&container));
    one.unwrap();
    two.unwrap();
    sandbox.remove_container(&container).await.unwrap();
    assert!(sandbox.view().containers.is_empty());
    assert!(host.shim(&id).containers.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_hangs_does_not_keep_a_stop_waiting() {
    let host = FakeHost::new();
    let (_sandboxes, sandbox, id) = ready_pod(&host).await;
    host.shim(&id).stuck.lock().unwrap().insert("create");
    let new = container(&id, "c");
    let maker = sandbox.clone();
    let creation = tokio::spawn(async move { maker.create_container(new).await });
    sandbox.wait_for(|view| view.containers.len() == 1).await.unwrap();
    timeout(SOON, sandbox.stop()).await.unwrap().unwrap();
    timeout(SOON, creation).await.unwrap().unwrap().unwrap_err();
    let emptied = sandbox.wait_for(|view| view.containers.is_empty());
    timeout(SOON, emptied).await.unwrap().unwrap();
}

mod whatever_is_asked {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Stop,
        Create(u8),
        Start(u8),
        RemoveContainer(u8),
        Exit(u8),
        BoundaryEnds,
        ShimDies,
        Fail(&'static str),
        ServerDies,
    }

    fn step() -> impl Strategy<Value = Step> {
        let name = 0u8..3;
        prop_oneof![
            1 => Just(Step::Stop),
            4 => name.clone().prop_map(Step::Create),
            4 => name.clone().prop_map(Step::Start),
            2 => name.clone().prop_map(Step::RemoveContainer),
            2 => name.prop_map(Step::Exit),
            1 => Just(Step::BoundaryEnds),
            1 => Just(Step::ShimDies),
            1 => prop_oneof![Just("detach"), Just("end"), Just("ended")].prop_map(Step::Fail),
            1 => Just(Step::ServerDies),
        ]
    }

    async fn play(steps: Vec<Step>) {
        let host = FakeHost::new();
        let (mut sandboxes, mut sandbox, id) = ready_pod(&host).await;
        let named = |sandbox: &Sandbox, name: u8| {
            let view = sandbox.view();
            view.containers.values().find(|c| c.spec.name == name.to_string()).map(|c| c.id.clone())
        };
        let alive = |host: &FakeHost| (host.census().3 == 1).then(|| host.shim(&id));
        for step in steps {
            let was = sandbox.view().record.state;
            let own = match step {
                Step::Start(n) | Step::RemoveContainer(n) | Step::Exit(n) => named(&sandbox, n),
                _ => None,
            };
            match (step, own) {
                (Step::Stop, _) => drop(sandbox.stop().await),
                (Step::Create(name), _) => {
                    drop(sandbox.create_container(container(&id, &name.to_string())).await);
                }
                (Step::Start(_), Some(own)) => drop(sandbox.start_container(&own).await),
                (Step::RemoveContainer(_), Some(own)) => drop(sandbox.remove_container(&own).await),
                (Step::Exit(_), Some(own)) => {
                    if let Some(shim) = alive(&host) {
                        shim.exit(own.as_str(), 1);
                    }
                }
                (Step::BoundaryEnds, _) => {
                    if let Some(shim) = alive(&host) {
                        shim.end_boundary("gone");
                    }
                }
                (Step::ShimDies, _) => host.kill_shim(&id),
                (Step::Fail(point), _) => host.fail(point, 1),
                (Step::ServerDies, _) => {
                    drop(sandboxes);
                    sandboxes = recovered(&host).await;
                    sandbox = sandboxes.only();
                }
                _ => {}
            }
            let is = sandbox.view().record.state;
            assert!(was == SandboxState::Ready || is != SandboxState::Ready, "a stop was undone");
        }
        // Whatever happened, kubelet's repeated removal ends with nothing left.
        let removed = async { while sandbox.remove().await.is_err() {} };
        timeout(SOON, removed).await.unwrap();
        assert_eq!(host.census(), NOTHING);
        assert!(sandboxes.saved().is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn a_removal_ends_it_and_no_stop_is_undone(steps in prop::collection::vec(step(), 0..12)) {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap()
                .block_on(play(steps));
        }
    }
}
