//! The serial port: a 16550 at 0x3f8 on interrupt line 4.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{Serial, SerialEvents};
use vm_superio::{SerialState, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::output::Output;
use crate::lock;

/// First of its eight ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt line, as on every PC.
const SERIAL_IRQ: u32 = 4;

/// The port. Any thread may use it.
pub struct SerialPort {
    device: Mutex<Serial<Line, Feeder, Output>>,
    line: Arc<InterruptLine>,
    input: Arc<InputGate>,
}

/// Between the port and whoever feeds it.
#[derive(Debug)]
pub struct InputGate {
    wake: EventFd,
    /// The feeder has more than fitted.
    more: AtomicBool,
    /// The guest is here to take it.
    open: AtomicBool,
}

/// What a guest can see of the port, in a saved state.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SavedSerial {
    /// Divisor latch low and high, interrupt enable and identification, line control and status, modem control and
    /// status, scratch.
    registers: [u8; 9],
    /// What has come in and was not read yet.
    input: Vec<u8>,
}

/// The interrupt line, edge-triggered. It is raised by a call and not through an irqfd: an irqfd delivers from a kernel
/// worker, and an interrupt that is on its way there when the state is saved would be lost.
struct InterruptLine {
    vm: Arc<VmFd>,
    muted: AtomicBool,
}

struct Line(Arc<InterruptLine>);

impl Trigger for Line {
    type E = kvm_ioctls::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        if self.0.muted.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.0.vm.set_irq_line(SERIAL_IRQ, true)?;
        self.0.vm.set_irq_line(SERIAL_IRQ, false)
    }
}

impl InputGate {
    /// A closed one.
    ///
    /// # Errors
    /// When the host gives no descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Self { wake: EventFd::new(EFD_NONBLOCK)?, more: AtomicBool::new(false), open: AtomicBool::new(false) })
    }

    /// Wakes the feeder.
    pub fn wake(&self) {
        // The counter is never near its end: the feeder takes it to zero.
        let _ = self.wake.write(1);
    }

    /// Readable when the feeder should look again; [`Self::woken`] ends that.
    #[must_use]
    pub fn wakeups(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.wake.as_raw_fd()) }
    }

    /// The feeder is awake.
    pub fn woken(&self) {
        let _ = self.wake.read();
    }
}

struct Feeder(Arc<InputGate>);

impl SerialEvents for Feeder {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self.0.more.swap(false, Ordering::SeqCst) {
            self.0.wake();
        }
    }
}

impl SerialPort {
    /// A port as after power-on, fed through `input`.
    #[must_use]
    pub fn new(vm: Arc<VmFd>, output: Output, input: Arc<InputGate>) -> Self {
        let line = Arc::new(InterruptLine { vm, muted: AtomicBool::new(false) });
        let device = Serial::with_events(Line(Arc::clone(&line)), Feeder(Arc::clone(&input)), output);
        Self { device: Mutex::new(device), line, input }
    }

    /// The guest writes to a register.
    pub fn write(&self, register: u8, value: u8) {
        // The output never fails, and a refused interrupt line is nothing that a guest could be told.
        if let Err(error) = lock(&self.device).write(register, value) {
            tracing::debug!(?error, "serial port");
        }
    }

    /// The guest reads a register.
    #[must_use]
    pub fn read(&self, register: u8) -> u8 {
        lock(&self.device).read(register)
    }

    /// Puts what has come in before the guest, as much of it as fits, and takes it out of `bytes`. What is left fits when the
    /// feeder is woken.
    pub fn feed(&self, bytes: &mut VecDeque<u8>) {
        let mut device = lock(&self.device);
        while self.accepts_input()
            && device.fifo_capacity() > 0
            && let Some(byte) = bytes.front()
            && device.enqueue_raw_bytes(&[*byte]).is_ok_and(|taken| taken == 1)
        {
            bytes.pop_front();
        }
        self.input.more.store(!bytes.is_empty(), Ordering::SeqCst);
    }

    /// Whether there is a guest here that could read.
    #[must_use]
    pub fn accepts_input(&self) -> bool {
        self.input.open.load(Ordering::SeqCst)
    }

    /// The guest runs here: input is for it.
    pub fn open_input(&self) {
        if !self.input.open.swap(true, Ordering::SeqCst) {
            self.input.wake();
        }
    }

    /// Where the feeder is woken.
    #[must_use]
    pub fn input(&self) -> &Arc<InputGate> {
        &self.input
    }

    /// What a guest can see of it. No input is taken from here on, so that none is lost with a machine that is given up;
    /// [`Self::open_input`] ends that.
    #[must_use]
    pub fn save(&self) -> SavedSerial {
        let device = lock(&self.device);
        self.input.open.store(false, Ordering::SeqCst);
        let state = device.state();
        SavedSerial {
            registers: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            input: state.in_buffer,
        }
    }

    /// Makes the port what was saved. Raises no interrupt: one that is pending is in the interrupt controllers' state.
    ///
    /// # Errors
    /// When more input was saved than a port can hold.
    pub fn load(&self, saved: &SavedSerial) -> Result<(), String> {
        let [dll, dlh, ier, iir, lcr, lsr, mcr, msr, scratch] = saved.registers;
        let state = SerialState {
            baud_divisor_low: dll,
            baud_divisor_high: dlh,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer: saved.input.clone(),
        };
        let mut device = lock(&self.device);
        let output = device.writer().clone();
        self.line.muted.store(true, Ordering::SeqCst);
        let loaded = Serial::from_state(&state, Line(Arc::clone(&self.line)), Feeder(Arc::clone(&self.input)), output);
        self.line.muted.store(false, Ordering::SeqCst);
        *device = loaded.map_err(|error| format!("the serial port's input: {error}"))?;
        Ok(())
    }
}
