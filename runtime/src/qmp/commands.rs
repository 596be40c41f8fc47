//! The commands: what each takes, what it does, what it returns.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use switchover_hybrid::lazy::Lazily;
use switchover_hybrid::saving::How;
use switchover_hybrid::settings::{Settings, Tunables};
use switchover_hybrid::status::MigrationStatus;
use switchover_wire::tls::Role;

use super::arguments::Arguments;
use super::capabilities::Capabilities;
use super::channel::{Target, parse_uri, take_target};
use super::controller::Controller;
use super::parameters::Parameters;
use super::refusal::Refusal;
use super::security::security;
use super::{dirty, query, settings};
use crate::run_state::RunState;

/// The version of QEMU whose protocol this is: what clients decide by which fields they may expect.
const QEMU_VERSION: [u64; 3] = [10, 0, 0];

/// Carries commands out. All connections share one: capabilities and parameters are the machine's, not a client's.
pub struct Commands {
    controller: Arc<dyn Controller>,
    options: Mutex<Options>,
}

#[derive(Clone, Default)]
struct Options {
    capabilities: Capabilities,
    parameters: Parameters,
}

type Command = fn(&Commands, Arguments) -> Result<Value, Refusal>;

/// Every command, by name. `qmp_capabilities` is here to be listed; a session answers it itself.
const TABLE: [(&str, Command); 30] = [
    ("calc-dirty-rate", |own, arguments| dirty::calc_dirty_rate(&*own.controller, arguments)),
    ("cancel-vcpu-dirty-limit", |own, arguments| dirty::cancel_vcpu_dirty_limit(&*own.controller, arguments)),
    ("cont", Commands::cont),
    ("migrate", Commands::migrate),
    ("migrate-continue", Commands::migrate_continue),
    ("migrate-incoming", Commands::migrate_incoming),
    ("migrate-pause", Commands::migrate_pause),
    ("migrate-recover", Commands::migrate_recover),
    ("migrate-set-capabilities", Commands::set_capabilities),
    ("migrate-set-parameters", Commands::set_parameters),
    ("migrate-start-postcopy", Commands::start_postcopy),
    ("migrate_cancel", Commands::cancel),
    ("qmp_capabilities", Commands::negotiated_already),
    ("query-commands", Commands::query_commands),
    ("query-dirty-rate", |own, arguments| dirty::query_dirty_rate(&*own.controller, arguments)),
    ("query-kvm", Commands::query_kvm),
    ("query-migrate", Commands::query_migrate),
    ("query-migrate-capabilities", Commands::query_capabilities),
    ("query-migrate-parameters", Commands::query_parameters),
    ("query-name", Commands::query_name),
    ("query-status", Commands::query_status),
    ("query-target", Commands::query_target),
    ("query-vcpu-dirty-limit", |own, arguments| dirty::query_vcpu_dirty_limit(&*own.controller, arguments)),
    ("query-version", Commands::query_version),
    ("quit", Commands::quit),
    ("set-vcpu-dirty-limit", |own, arguments| dirty::set_vcpu_dirty_limit(&*own.controller, arguments)),
    ("stop", Commands::stop),
    ("x-switchover-checkpoint", Commands::checkpoint),
    ("x-switchover-reclaim", Commands::reclaim),
    ("x-switchover-report", Commands::report),
];

/// What `query-version` returns, and the greeting holds.
#[must_use]
pub fn version() -> Value {
    let [major, minor, micro] = QEMU_VERSION;
    json!({
        "qemu": { "major": major, "minor": minor, "micro": micro },
        "package": concat!("switchover ", env!("CARGO_PKG_VERSION")),
    })
}

impl Commands {
    /// Commands that act on `controller`.
    #[must_use]
    pub fn new(controller: Arc<dyn Controller>) -> Self {
        Self::with(controller, Parameters::default())
    }

    /// The same, with these parameters to begin with.
    #[must_use]
    pub fn with(controller: Arc<dyn Controller>, parameters: Parameters) -> Self {
        let options = Options { parameters, ..Options::default() };
        Self { controller, options: Mutex::new(options) }
    }

    /// Carries the command `name` out. `quit` is only checked: [`end`](Self::end) does it, when its reply is out.
    ///
    /// # Errors
    /// When there is no such command, its arguments are not right, or it cannot be done now.
    pub fn execute(&self, name: &str, arguments: Arguments) -> Result<Value, Refusal> {
        let found = TABLE.iter().find(|(known, _)| *known == name);
        let (_, command) =
            found.ok_or_else(|| Refusal::not_found(format_args!("The command {name} has not been found")))?;
        let audit = self.controller.audit();
        let given = audit.is_on().then(|| arguments.to_json());
        let answer = command(self, arguments);
        audit.note_command(name, given.as_deref(), answer.as_ref().err().map(|refusal| refusal.desc.as_str()));
        answer
    }

    /// Ends the machine.
    pub fn end(&self) {
        self.controller.quit();
    }

    /// Whether the capability `events` is on.
    #[must_use]
    pub fn tells_migration_events(&self) -> bool {
        self.options().capabilities.has("events")
    }

    fn options(&self) -> MutexGuard<'_, Options> {
        self.options.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cont(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        self.controller.cont().map_err(Refusal::generic).map(|()| json!({}))
    }

    fn stop(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        self.controller.stop().map_err(Refusal::generic).map(|()| json!({}))
    }

    fn quit(&self, mut arguments: Arguments) -> Result<Value, Refusal> {
        let force: Option<bool> = arguments.optional("x-switchover-force")?;
        arguments.finish()?;
        if force == Some(true) {
            return Ok(json!({}));
        }
        self.controller.may_quit().map_err(Refusal::generic).map(|()| json!({}))
    }

    fn negotiated_already(&self, _: Arguments) -> Result<Value, Refusal> {
        Err(Refusal::not_found("Capabilities negotiation is already complete, command ignored"))
    }

    fn migrate(&self, mut arguments: Arguments) -> Result<Value, Refusal> {
        let to = take_target(&mut arguments)?;
        let resume = arguments.optional::<bool>("resume")?.unwrap_or(false);
        // QEMU takes and ignores it, since its migrations always go on by themselves.
        arguments.optional::<bool>("detach")?;
        arguments.finish()?;
        let to = match to {
            Target::Machine(to) => to,
            Target::File(_) if resume => {
                return Err(Refusal::generic("a save to a file has no link that could be resumed"));
            }
            Target::File(path) => return self.save(&path),
        };
        if resume {
            let options = self.options();
            let (settings, security) =
                (options.settings(), security(&options.parameters, Role::Source).map_err(Refusal::generic)?);
            drop(options);
            return self
                .controller
                .resume_migration(to, settings, security)
                .map_err(Refusal::generic)
                .map(|()| json!({}));
        }
        // Held until it has begun: from then on, options that hold from its beginning cannot be changed.
        let options = self.options();
        let security = security(&options.parameters, Role::Source).map_err(Refusal::generic)?;
        self.controller.migrate(to, options.settings(), security).map_err(Refusal::generic).map(|()| json!({}))
    }

    fn save(&self, to: &Path) -> Result<Value, Refusal> {
        // Held until it has begun, as for a migration.
        let options = self.options();
        let settings = options.settings();
        if settings.postcopy {
            return Err(Refusal::generic(
                "a guest that is saved to a file cannot be handed over: switch the capability 'postcopy-ram' off, and set the \
                 parameter 'x-switchover-mode' to 'precopy'",
            ));
        }
        if settings.pause_before_switchover {
            return Err(Refusal::generic(
                "a save to a file waits for nobody: switch the capability 'pause-before-switchover' off",
            ));
        }
        let how = How { compress: options.parameters.compress_image, live: options.parameters.live_save };
        if how.compress && how.live {
            return Err(Refusal::generic(
                "a guest that is saved while it runs cannot be compressed: set one of 'x-switchover-live-save' and \
                 'x-switchover-compress-image' to false",
            ));
        }
        self.controller.save(to, how).map_err(Refusal::generic).map(|()| json!({}))
    }

    fn checkpoint(&self, mut arguments: Arguments) -> Result<Value, Refusal> {
        let to: String = arguments.required("to")?;
        let base: Option<String> = arguments.optional("base")?;
        arguments.finish()?;
        self.controller
            .checkpoint(Path::new(&to), base.as_deref().map(Path::new))
            .map_err(Refusal::generic)
            .map(|()| json!({}))
    }

    fn migrate_recover(&self, mut arguments: Arguments) -> Result<Value, Refusal> {
        let uri: String = arguments.required("uri")?;
        arguments.finish()?;
        let at = parse_uri(&uri)?;
        self.controller.recover(&at).map_err(Refusal::generic).map(|()| json!({}))
    }

    fn migrate_pause(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        self.controller.pause_migration().map_err(Refusal::generic).map(|()| json!({}))
    }

    fn reclaim(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        self.controller.reclaim().map_err(Refusal::generic).map(|()| json!({}))
    }

    fn migrate_incoming(&self, mut arguments: Arguments) -> Result<Value, Refusal> {
        let at = take_target(&mut arguments)?;
        let exits = arguments.optional::<bool>("exit-on-error")?.unwrap_or(true);
        arguments.finish()?;
        if !exits {
            return Err(Refusal::generic(
                "Parameter 'exit-on-error' cannot be false: a destination always ends when its migration fails before \
                 the handoff",
            ));
        }
        let at = match at {
            Target::Machine(at) => at,
            Target::File(path) => {
                let restored = if self.options().parameters.lazy_restore {
                    self.controller.restore_lazily(&path, Lazily::default())
                } else {
                    self.controller.restore(&path)
                };
                return restored.map_err(Refusal::generic).map(|()| json!({}));
            }
        };
        let options = self.options();
        let (settings, security) =
            (options.settings(), security(&options.parameters, Role::Destination).map_err(Refusal::generic)?);
        drop(options);
        self.controller.listen(&at, settings, security).map_err(Refusal::generic).map(|()| json!({}))
    }

    fn start_postcopy(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        if !self.options().settings().postcopy {
            return Err(Refusal::generic(
                "Enable postcopy with migrate-set-capabilities before the start of migration",
            ));
        }
        self.controller.start_postcopy().map_err(Refusal::generic).map(|()| json!({}))
    }

    fn migrate_continue(&self, mut arguments: Arguments) -> Result<Value, Refusal> {
        let wanted: String = arguments.required("state")?;
        arguments.finish()?;
        let wanted: MigrationStatus =
            serde_json::from_value(json!(wanted)).map_err(|_| Refusal::not_accepted("state", &wanted))?;
        let now = self.controller.migration().map_or(MigrationStatus::None, |view| view.progress.status);
        if wanted != now {
            return Err(Refusal::generic(format_args!("Migration not in expected state: {now}")));
        }
        if now != MigrationStatus::PreSwitchover {
            return Err(Refusal::generic(format_args!(
                "Parameter 'state' must be 'pre-switchover': a migration in state '{now}' does not wait to be continued"
            )));
        }
        self.controller.continue_switchover().map_err(Refusal::generic).map(|()| json!({}))
    }

    fn cancel(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        self.controller.cancel().map_err(Refusal::generic).map(|()| json!({}))
    }

    fn set_capabilities(&self, arguments: Arguments) -> Result<Value, Refusal> {
        let mut options = self.options();
        if self.is_under_way() {
            return Err(Refusal::generic("There's a migration process in progress"));
        }
        options.capabilities = options.capabilities.set(arguments)?;
        Ok(json!({}))
    }

    /// As in QEMU, parameters can be set at any time. Limits and bandwidths take effect at once.
    fn set_parameters(&self, arguments: Arguments) -> Result<Value, Refusal> {
        // Held until the migration has been told: of two clients the later one is heeded.
        let mut options = self.options();
        let under_way = self.is_under_way();
        let after = options.parameters.set(arguments)?;
        if under_way {
            options.parameters.check_under_way(&after)?;
        }
        if self.is_linked() {
            options.parameters.check_linked(&after)?;
        }
        if options.parameters.silence_ms != after.silence_ms {
            self.controller.set_silence(settings::silence(&after));
        }
        if under_way {
            let tunables = Tunables { limits: settings::limits(&after), bandwidth: settings::bandwidth(&after) };
            self.controller.set_tunables(tunables);
        }
        options.parameters = after;
        Ok(json!({}))
    }

    /// Whether a migration out of this machine is under way: it has taken its settings along.
    fn is_under_way(&self) -> bool {
        let view = self.controller.migration();
        view.is_some_and(|view| view.listening_at.is_none() && view.progress.status.is_under_way())
    }

    /// Whether a link is open, or about to be, whose two ends have agreed on how it is watched.
    fn is_linked(&self) -> bool {
        self.controller.migration().is_some_and(|view| match view.progress.status {
            // A destination may be waiting for its source; then it can still be told.
            MigrationStatus::Setup => view.listening_at.is_none(),
            MigrationStatus::PostcopyPaused => false,
            status => status.is_under_way(),
        })
    }

    fn query_capabilities(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        Ok(self.options().capabilities.to_value())
    }

    fn query_parameters(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        Ok(self.options().parameters.to_value())
    }

    fn query_migrate(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        let options = self.options();
        let Options { capabilities, parameters } = &*options;
        let around = query::Surroundings {
            vcpus: self.controller.vcpus(),
            blockers: self.controller.blockers(),
            xbzrle_cache_size: capabilities.has("xbzrle").then_some(parameters.xbzrle_cache_size),
        };
        Ok(query::migration(self.controller.migration().as_ref(), &around))
    }

    fn query_commands(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        Ok(TABLE.iter().map(|(name, _)| json!({ "name": name })).collect())
    }

    fn query_kvm(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        Ok(json!({ "enabled": true, "present": true }))
    }

    fn query_name(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        Ok(json!({}))
    }

    fn query_status(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        let state = self.controller.run_state();
        Ok(json!({ "status": state, "running": state == RunState::Running }))
    }

    fn query_target(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        Ok(json!({ "arch": std::env::consts::ARCH }))
    }

    fn query_version(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        Ok(version())
    }

    fn report(&self, arguments: Arguments) -> Result<Value, Refusal> {
        arguments.finish()?;
        let none = || Refusal::generic("There has been no migration to report on");
        serde_json::to_value(self.controller.report().ok_or_else(none)?).map_err(Refusal::generic)
    }
}

impl Options {
    fn settings(&self) -> Settings {
        settings::settings(&self.capabilities, &self.parameters)
    }
}
