//! A picture and the panels in it: plotters' drawing areas with this report's type, colours and axes.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use thiserror::Error;

use super::ticks::Tick;

/// plotters places things on whole pixels: the pictures are drawn this much larger than they are shown.
const SCALE: i32 = 4;
/// plotters' SVG backend divides font sizes by this.
const FONT_FACTOR: f64 = 1.24;
/// Length of a dash and of the space behind it, in pixels as shown.
const DASH: i32 = 4;
const FONT: &str = "sans-serif";
/// Of tick labels, in pixels as shown.
pub const SMALL: i32 = 11;
/// Of everything else.
pub const NORMAL: i32 = 12;

/// A picture could not be drawn.
#[derive(Debug, Error)]
#[error("cannot draw a plot: {0}")]
pub struct PlotError(String);

impl PlotError {
    fn new(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// What a colour is for. The page's style sheet says what it looks like; see [`Ink::css_name`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ink {
    /// Text and axes.
    Text,
    /// Tick labels, remarks.
    Muted,
    /// Grid lines.
    Grid,
    /// The page.
    Paper,
    /// Text on a filled bar.
    OnFill,
    /// What matters most in a picture.
    Main,
    /// The second thing.
    Second,
    /// The third.
    Third,
    /// The fourth.
    Fourth,
    /// The fifth.
    Fifth,
    /// The blackout, and what is bad.
    Alarm,
    /// What is there but does not matter.
    Quiet,
}

impl Ink {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Text,
        Self::Muted,
        Self::Grid,
        Self::Paper,
        Self::OnFill,
        Self::Main,
        Self::Second,
        Self::Third,
        Self::Fourth,
        Self::Fifth,
        Self::Alarm,
        Self::Quiet,
    ];

    /// Its variable in the page's style sheet.
    #[must_use]
    pub const fn css_name(self) -> &'static str {
        match self {
            Self::Text => "--ink",
            Self::Muted => "--muted",
            Self::Grid => "--grid",
            Self::Paper => "--paper",
            Self::OnFill => "--on-fill",
            Self::Main => "--c1",
            Self::Second => "--c2",
            Self::Third => "--c3",
            Self::Fourth => "--c4",
            Self::Fifth => "--c5",
            Self::Alarm => "--alarm",
            Self::Quiet => "--quiet",
        }
    }

    /// The colour that stands for it in the SVG. It is the light palette's, so that a picture taken out of the
    /// page still looks right.
    #[must_use]
    pub const fn stand_in(self) -> (u8, u8, u8) {
        match self {
            Self::Text => (0x1b, 0x1f, 0x24),
            Self::Muted => (0x5f, 0x68, 0x73),
            Self::Grid => (0xe2, 0xe5, 0xe9),
            Self::Paper => (0xff, 0xff, 0xfe),
            Self::OnFill => (0xff, 0xff, 0xff),
            Self::Main => (0x25, 0x63, 0xc9),
            Self::Second => (0xc9, 0x6a, 0x12),
            Self::Third => (0x0f, 0x84, 0x73),
            Self::Fourth => (0x80, 0x4f, 0xc2),
            Self::Fifth => (0x8a, 0x71, 0x0c),
            Self::Alarm => (0xc9, 0x25, 0x4b),
            Self::Quiet => (0x93, 0x9c, 0xa8),
        }
    }

    /// The stand-in as the SVG has it: `#2563C9`.
    #[must_use]
    pub fn hex(self) -> String {
        let (r, g, b) = self.stand_in();
        format!("#{r:02X}{g:02X}{b:02X}")
    }

    fn colour(self) -> RGBColor {
        let (r, g, b) = self.stand_in();
        RGBColor(r, g, b)
    }
}

/// Where a text stands relative to its point.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Anchor {
    /// The text begins there.
    Left,
    /// Its middle is there.
    Middle,
    /// It ends there.
    Right,
}

type Root<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// A picture being drawn.
pub struct Canvas<'a> {
    root: Root<'a>,
}

/// Draws a picture of `width` by `height` pixels.
///
/// # Errors
/// What `draw` fails with.
pub fn picture(
    width: u32,
    height: u32,
    draw: impl FnOnce(&Canvas<'_>) -> Result<(), PlotError>,
) -> Result<String, PlotError> {
    let scale = SCALE.unsigned_abs();
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (width * scale, height * scale)).into_drawing_area();
        let canvas = Canvas { root };
        draw(&canvas)?;
        canvas.root.present().map_err(PlotError::new)?;
    }
    Ok(svg)
}

/// A rectangle of a picture with axes of its own.
pub struct Panel<'a> {
    area: Area<'a>,
    root: Root<'a>,
    x: Range<f64>,
    y: Range<f64>,
    left: i32,
    top: i32,
    right: i32,
    bottom: i32,
}

impl<'a> Canvas<'a> {
    /// A panel over the pixels `across` and `down`, whose axes show `x` (left to right) and `y` (bottom to top).
    #[must_use]
    pub fn panel(&self, across: Range<i32>, down: Range<i32>, x: Range<f64>, y: Range<f64>) -> Panel<'a> {
        let pixels = (across.start * SCALE..across.end * SCALE, down.end * SCALE..down.start * SCALE);
        let spec = Cartesian2d::new(x.clone(), y.clone(), pixels);
        Panel {
            area: self.root.clone().apply_coord_spec(spec),
            root: self.root.clone(),
            x,
            y,
            left: across.start,
            top: down.start,
            right: across.end,
            bottom: down.end,
        }
    }
}

impl Panel<'_> {
    /// Draws vertical grid lines at `ticks` with their labels below.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn x_axis(&self, ticks: &[Tick], title: &str) -> Result<(), PlotError> {
        for tick in ticks {
            self.line(&[(tick.at, self.y.start), (tick.at, self.y.end)], Ink::Grid, 1)?;
            let x = self.area.map_coordinate(&(tick.at, self.y.start)).0 / SCALE;
            self.pixel_text(&tick.label, x, self.bottom + 14, Anchor::Middle, Ink::Muted, SMALL)?;
        }
        self.line(&[(self.x.start, self.y.start), (self.x.end, self.y.start)], Ink::Muted, 1)?;
        self.pixel_text(
            title,
            i32::midpoint(self.left, self.right),
            self.bottom + 33,
            Anchor::Middle,
            Ink::Text,
            NORMAL,
        )
    }

    /// Draws horizontal grid lines at `ticks` with their labels to the left, and `title` above the axis.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn y_axis(&self, ticks: &[Tick], title: &str) -> Result<(), PlotError> {
        for tick in ticks {
            self.line(&[(self.x.start, tick.at), (self.x.end, tick.at)], Ink::Grid, 1)?;
            let y = self.area.map_coordinate(&(self.x.start, tick.at)).1 / SCALE;
            self.pixel_text(&tick.label, self.left - 7, y + 4, Anchor::Right, Ink::Muted, SMALL)?;
        }
        self.pixel_text(title, self.left, self.top - 10, Anchor::Left, Ink::Text, NORMAL)
    }

    /// A line through `points`, `width` pixels wide. What leaves the panel is drawn on its edge.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn line(&self, points: &[(f64, f64)], ink: Ink, width: u32) -> Result<(), PlotError> {
        self.faint_line(points, ink, width, 1.0)
    }

    /// A line as [`line`](Self::line) draws it, let through to `opacity`.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn faint_line(&self, points: &[(f64, f64)], ink: Ink, width: u32, opacity: f64) -> Result<(), PlotError> {
        let points: Vec<_> = points.iter().map(|point| self.clamp(*point)).collect();
        let style = ink.colour().mix(opacity).stroke_width(width * SCALE.unsigned_abs());
        self.area.draw(&PathElement::new(points, style)).map_err(PlotError::new)
    }

    /// A dashed vertical line at `x`.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn rule(&self, x: f64, ink: Ink) -> Result<(), PlotError> {
        let dashes = ((self.bottom - self.top) / DASH).max(1);
        let step = (self.y.end - self.y.start) / f64::from(dashes);
        (0..dashes).step_by(2).try_for_each(|dash| {
            let from = self.y.start + step * f64::from(dash);
            self.line(&[(x, from), (x, from + step)], ink, 1)
        })
    }

    /// A dashed horizontal line at `y`.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn level(&self, y: f64, ink: Ink) -> Result<(), PlotError> {
        let dashes = ((self.right - self.left) / DASH).max(1);
        let step = (self.x.end - self.x.start) / f64::from(dashes);
        (0..dashes).step_by(2).try_for_each(|dash| {
            let from = self.x.start + step * f64::from(dash);
            self.line(&[(from, y), (from + step, y)], ink, 1)
        })
    }

    /// Fills from `points` down to the panel's bottom.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn fill_below(&self, points: &[(f64, f64)], ink: Ink, opacity: f64) -> Result<(), PlotError> {
        let (Some(first), Some(last)) = (points.first(), points.last()) else { return Ok(()) };
        let mut outline: Vec<_> = points.iter().map(|point| self.clamp(*point)).collect();
        outline.push(self.clamp((last.0, self.y.start)));
        outline.push(self.clamp((first.0, self.y.start)));
        self.area.draw(&Polygon::new(outline, ink.colour().mix(opacity).filled())).map_err(PlotError::new)
    }

    /// A filled rectangle.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn bar(&self, x: Range<f64>, y: Range<f64>, ink: Ink, opacity: f64) -> Result<(), PlotError> {
        let corners = [self.clamp((x.start, y.start)), self.clamp((x.end, y.end))];
        self.area.draw(&Rectangle::new(corners, ink.colour().mix(opacity).filled())).map_err(PlotError::new)
    }

    /// A filled circle around `point`, `radius` pixels wide either way.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn dot(&self, point: (f64, f64), radius: i32, ink: Ink) -> Result<(), PlotError> {
        let circle = Circle::new(self.clamp(point), radius * SCALE, ink.colour().mix(0.75).filled());
        self.area.draw(&circle).map_err(PlotError::new)
    }

    /// A text whose baseline's anchor is the point of the axes `(x, y)`, moved by `offset` pixels.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn text(
        &self,
        text: &str,
        (x, y): (f64, f64),
        offset: (i32, i32),
        anchor: Anchor,
        ink: Ink,
    ) -> Result<(), PlotError> {
        let (x, y) = self.area.map_coordinate(&self.clamp((x, y)));
        self.pixel_text(text, x / SCALE + offset.0, y / SCALE + offset.1, anchor, ink, SMALL)
    }

    /// A text at a pixel of the picture.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn pixel_text(&self, text: &str, x: i32, y: i32, anchor: Anchor, ink: Ink, size: i32) -> Result<(), PlotError> {
        let horizontal = match anchor {
            Anchor::Left => HPos::Left,
            Anchor::Middle => HPos::Center,
            Anchor::Right => HPos::Right,
        };
        let colour = ink.colour();
        let style = TextStyle::from((FONT, f64::from(size * SCALE) * FONT_FACTOR).into_font())
            .color(&colour)
            .pos(Pos::new(horizontal, VPos::Bottom));
        // The backend lifts such a text by half an ex: put it back.
        let baseline = y * SCALE + size * SCALE / 4;
        self.root.draw(&Text::new(text.to_owned(), (x * SCALE, baseline), style)).map_err(PlotError::new)
    }

    /// How many pixels `span` of the x axis takes.
    #[must_use]
    pub fn width_of(&self, span: f64) -> f64 {
        span / (self.x.end - self.x.start) * f64::from(self.right - self.left)
    }

    /// A row of coloured names above the panel, to the right.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn legend(&self, names: &[(&str, Ink)]) -> Result<(), PlotError> {
        let mut right = self.right;
        for (name, ink) in names.iter().rev() {
            self.pixel_text(name, right, self.top - 10, Anchor::Right, Ink::Text, SMALL)?;
            right -= estimated_width(name) + 17;
            let (top, bottom) = ((self.top - 17) * SCALE, (self.top - 9) * SCALE);
            let swatch = [((right - 1) * SCALE, top), ((right + 9) * SCALE, bottom)];
            self.root.draw(&Rectangle::new(swatch, ink.colour().filled())).map_err(PlotError::new)?;
            right -= 14;
        }
        Ok(())
    }

    fn clamp(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (x.clamp(self.x.start, self.x.end), y.clamp(self.y.start, self.y.end))
    }
}

/// About how many pixels a small text takes; there is no font here to ask.
#[must_use]
pub fn estimated_width(text: &str) -> i32 {
    i32::try_from(text.chars().count()).unwrap_or(i32::MAX / 8).saturating_mul(11) / 2
}
